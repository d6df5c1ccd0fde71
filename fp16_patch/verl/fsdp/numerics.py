"""What stays in FP32 between the model's logits and the loss: temperature, log-softmax, log-probs, entropy."""

from __future__ import annotations

from typing import Any

import torch

from fp16_patch.patching.call_arguments import bound
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.verl.fsdp.engine import role_of

_SMALLEST_TEMPERATURE = 1e-8
_QUANTITY_OF_OUTPUT = {"log_probs": "log_prob", "entropy": "entropy"}


def scale_logits_by_temperature(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """`_scale_logits_by_temperature`: divide logits in FP32, as vLLM does.

    verl's bound on the temperature, 1e-8, is 0 once cast to FP16.
    """
    if not current_plan().overrides_dtype:
        return wrapped(*args, **kwargs)
    return _in_fp32(*args, **kwargs)


def _in_fp32(logits: torch.Tensor, temperature: torch.Tensor, *, is_unit_temperature: bool) -> torch.Tensor:
    if not is_unit_temperature:
        quotient: torch.Tensor = _QuotientInFP32.apply(logits, temperature.float().clamp(min=_SMALLEST_TEMPERATURE))
        return quotient
    return logits if autocast_upcasts_softmax() else logits.float()


class _QuotientInFP32(torch.autograd.Function):  # type: ignore[misc]  # torch has no types for it
    """Divides logits in FP32; their gradient is divided in FP32 and rounded once, without an FP32 copy in between.

    Of logits in half precision, 6 bytes each are alive in the forward pass, and 6 more in the backward pass at most.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(temperature)
        ctx.dtype = logits.dtype
        # One FP32 temperature a row promotes the quotient; upcasting the logits first would cost a copy of them.
        return logits / temperature

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (temperature,) = ctx.saved_tensors
        return torch.div(gradient, temperature, out=torch.empty_like(gradient, dtype=ctx.dtype)), None


def divide_in_fp32(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`FSDPEngineWithLMHead.prepare_model_outputs` where it divides by the temperature: let it divide in FP32."""
    call = bound(wrapped, args, kwargs).arguments
    output, micro_batch = call["output"], call["micro_batch"]
    # Fused kernels return log-probs and no logits.
    if current_plan().overrides_dtype and getattr(output, "logits", None) is not None:
        unit = is_unit(micro_batch["temperature"])
        output.logits = output.logits if unit and autocast_upcasts_softmax() else output.logits.float()
    return wrapped(*args, **kwargs)  # type: ignore[no-any-return]


def is_unit(temperature: Any) -> bool:
    """Return whether dividing by it does nothing, as far as one can tell without waiting for the device."""
    # One that differs from row to row lies on the device, and looking at it would wait for the device.
    if isinstance(temperature, torch.Tensor):
        return False
    return float(temperature) == 1


def autocast_upcasts_softmax() -> bool:
    """Return whether autocast runs softmax, log_softmax and logsumexp in FP32 by itself, as CUDA's does."""
    return bool(torch.is_autocast_enabled("cuda"))


def prepare_model_outputs(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`FSDPEngineWithLMHead.prepare_model_outputs`: note the dtypes of log-probs and entropy."""
    return note_outputs(role_of(engine), wrapped(*args, **kwargs))


def prepare_values(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`FSDPEngineWithValueHead.prepare_model_outputs`: note the dtype of the critic's values."""
    return note_values(role_of(engine), wrapped(*args, **kwargs))


def note_outputs(role: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """Note the dtypes of what an engine makes of a model's logits, and return it."""
    for key, quantity in _QUANTITY_OF_OUTPUT.items():
        if outputs.get(key) is not None:
            ledger().note(role, quantity, outputs[key].dtype)
    return outputs


def note_values(role: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """Note the dtype of a model's values, and return what holds them."""
    ledger().note(role, "value", outputs["values"].dtype)
    return outputs
