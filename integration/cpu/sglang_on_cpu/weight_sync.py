"""Weights on their way from learner to scheduler: shared memory in place of CUDA's handles."""

from types import ModuleType

import torch.multiprocessing
import wrapt


def install() -> None:
    # Sender and receiver are not relatives, and so cannot pass file descriptors to each other.
    torch.multiprocessing.set_sharing_strategy("file_system")
    wrapt.register_post_import_hook(leave_reductions, "sglang.srt.utils.patch_torch")


def leave_reductions(patch_torch: ModuleType) -> None:
    """SGLang changes how CUDA tensors are sent, by a place in a tuple that a CPU tensor's does not have."""
    patch_torch.monkey_patch_torch_reductions = lambda: None
