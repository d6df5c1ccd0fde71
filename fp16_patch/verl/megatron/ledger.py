"""The dtypes of what Megatron's engine and workers compute: log-probs, entropy and values."""

from __future__ import annotations

from typing import Any

from fp16_patch.runtime.activation import ledger
from fp16_patch.verl.fsdp.numerics import note_outputs, note_values
from fp16_patch.verl.megatron.dtypes import role_of


def prepare_model_outputs(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronEngineWithLMHead.prepare_model_outputs`: note the dtypes of log-probs and entropy."""
    return note_outputs(role_of(engine), wrapped(*args, **kwargs))


def prepare_values(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronEngineWithValueHead.prepare_model_outputs`: note the dtype of the critic's values."""
    return note_values(role_of(engine), wrapped(*args, **kwargs))


def compute_log_prob(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronPPOActor.compute_log_prob`: note the dtypes of its results; the ref is one without optimizer."""
    result = wrapped(*args, **kwargs)
    role = "ref" if actor.actor_optimizer is None else "actor"
    for quantity, tensor in zip(("log_prob", "entropy"), result, strict=False):
        if tensor is not None:
            ledger().note(role, quantity, tensor.dtype)
    return result


def compute_values(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronPPOCritic.compute_values`: note the dtype of the critic's values."""
    values = wrapped(*args, **kwargs)
    ledger().note("critic", "value", values.dtype)
    return values
