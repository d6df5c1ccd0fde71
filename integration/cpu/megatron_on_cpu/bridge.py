"""Megatron-Bridge, which imports TransformerEngine and Triton for layers that need not be used."""


def install() -> None:
    pass
