"""The Megatron engine's updates: a mini-batch over all its ranks, and its optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.gradient_stats import EMBEDDING, HEAD, LAYERS
from fp16_patch.scaling.retry import retries_wanted
from fp16_patch.scaling.saved_state import is_scale
from fp16_patch.scaling.update import MiniBatchUpdate
from fp16_patch.verl.config.supported_engines import MEGATRON
from fp16_patch.verl.megatron.dtypes import role_of
from fp16_patch.verl.megatron.step import MegatronStep, unwrapped

# What Megatron calls its heads for multi-token prediction.
_AHEAD = {"mtp"}


class MegatronUpdate(MegatronStep, MiniBatchUpdate):
    """The updates of verl's engine; every rank of the model takes part in each attempt."""

    @classmethod
    def of_engine(cls, engine: Any) -> MegatronUpdate:
        """Return the updates of a verl engine. They lie on its optimizer, which the LR schedule knows, too."""
        update = cls.of(engine.optimizer, role_of(engine), engine.module)
        update.share_with(engine)
        return update

    def module(self) -> nn.Module:
        models = [unwrapped(chunk) for chunk in self.chunks]
        return models[0] if len(models) == 1 else _together(models)

    def groups(self) -> Mapping[nn.Module, str]:
        return {module: group for chunk in self.chunks for module, group in groups_of_chunk(chunk).items()}

    def zero_grad(self) -> None:
        self.engine.zero_grad()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def loss_is_finite(self, result: Any) -> bool:
        # The last stage of a pipeline has it.
        return all(map(math.isfinite, result.get("loss", ())))

    def take(self, step: Any) -> Any:
        scale_before = self.loss_scale()
        answer = super().take(step)
        if not answer[0] and retries_wanted() and is_scale(scale_before) and self.loss_scale() == scale_before:
            # Hysteresis would have the same mini-batch computed again at the scale that it has just overflowed at.
            assert scale_before is not None
            self.set_loss_scale(max(scale_before * current_plan().backoff_factor, current_plan().min_scale))
        return answer


def groups_of_chunk(chunk: nn.Module) -> dict[nn.Module, str]:
    """Return the group of every module without children of a stage: by the layer's number in the whole model.

    What is outside of the layers is `embedding` by its name, else `head`; so are the heads that predict further tokens.
    """
    groups: dict[nn.Module, str] = {}
    for name, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        if number is not None and module not in groups and not _AHEAD & set(name.split(".")):
            group = LAYERS[min(len(LAYERS) * (number - 1) // module.config.num_layers, len(LAYERS) - 1)]
            groups.update(dict.fromkeys(module.modules(), group))
        elif module not in groups and next(module.children(), None) is None:
            groups[module] = EMBEDDING if "embedding" in name else HEAD
    return {module: group for module, group in groups.items() if next(module.children(), None) is None}


def is_repeatable(engine: Any) -> bool:
    """Return whether it is Megatron's engine, training with a scaled loss: the same answer on each of its ranks."""
    config = engine.engine_config
    return current_plan().scales_loss and config.strategy == MEGATRON and not config.forward_only


def optimizer_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.optimizer_step`: record the step. verl would take one that Megatron skipped for an error."""
    update = MegatronUpdate.of_engine(engine)
    if update.measuring:
        return 0.0
    with update.watching():
        return wrapped(*args, **kwargs)


def _together(chunks: list[nn.Module]) -> nn.Module:
    """Return a module that holds the stages of a pipeline that lie on one rank."""
    together = nn.Module()
    for number, chunk in enumerate(chunks):
        together.add_module(f"stage {number}", chunk)
    return together
