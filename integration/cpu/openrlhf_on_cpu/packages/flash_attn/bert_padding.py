"""Imported by OpenRLHF for packed samples, which are not used here: packing needs the kernels themselves."""

from typing import Any, NoReturn


def needs_cuda(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotImplementedError("packed samples need flash-attn, which needs CUDA")


index_first_axis = pad_input = rearrange = unpad_input = needs_cuda
