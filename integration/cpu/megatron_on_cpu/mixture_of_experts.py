"""Megatron's mixture of experts: counts that are on the host already, and a kernel that is asked for and not there."""

from types import ModuleType
from typing import Any

import torch
import wrapt


def install() -> None:
    wrapt.register_post_import_hook(leave_counts_where_they_are, "megatron.core.transformer.moe.token_dispatcher")
    wrapt.register_post_import_hook(name_the_kernel, "megatron.core.transformer.moe.moe_utils")


def leave_counts_where_they_are(token_dispatcher: ModuleType) -> None:
    """Tokens an expert are copied to the host by a stream of their own."""

    def on_the_host(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return counts.numpy() if as_numpy and torch.is_tensor(counts) else counts

    token_dispatcher.maybe_move_tensor_to_cpu = on_the_host


def name_the_kernel(moe_utils: ModuleType) -> None:
    """The router asks whether TransformerEngine's matrix product is there by a name that exists only with it."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
