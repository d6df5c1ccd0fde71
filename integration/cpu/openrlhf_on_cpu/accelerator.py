"""DeepSpeed's accelerator: a CPU that takes float16, as every GPU does."""

from types import ModuleType

import wrapt


def install() -> None:
    wrapt.register_post_import_hook(support_float16, "deepspeed.accelerator.cpu_accelerator")


def support_float16(accelerator: ModuleType) -> None:
    """DeepSpeed takes float16 only from a CPU with instructions for it; torch computes in it on any."""
    accelerator.CPU_Accelerator.is_fp16_supported = lambda _self: True
