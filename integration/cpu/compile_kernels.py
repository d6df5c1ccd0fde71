"""Compile the CPU kernels that DeepSpeed otherwise compiles in the middle of the first run, in each process at once."""

import os
import shutil

from integration.cpu.launch_openrlhf import ENVIRONMENT

KERNELS = ("FusedAdamBuilder", "ShareMemCommBuilder")


def main() -> None:
    os.environ.update(ENVIRONMENT)
    # What is there may be of another torch, or of a compilation that was broken off.
    shutil.rmtree(ENVIRONMENT["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
    from deepspeed.accelerator import get_accelerator

    for kernel in KERNELS:
        get_accelerator().create_op_builder(kernel).load()


if __name__ == "__main__":
    main()
