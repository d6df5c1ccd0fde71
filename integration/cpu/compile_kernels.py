"""Compile the CPU kernels that DeepSpeed otherwise compiles in the middle of the first run, in each process at once."""

import os

from integration.cpu.launch_openrlhf import ENVIRONMENT, release_kernels

KERNELS = ("FusedAdamBuilder", "ShareMemCommBuilder")


def main() -> None:
    os.environ.update(ENVIRONMENT)
    release_kernels()  # of a compilation that was broken off
    from deepspeed.accelerator import get_accelerator

    for kernel in KERNELS:
        get_accelerator().create_op_builder(kernel).load()


if __name__ == "__main__":
    main()
