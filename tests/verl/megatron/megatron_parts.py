"""What Megatron's own parts do, as far as verl's code around them can see: its scaler, optimizers and models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

HUGE = 1e6  # what float16 overflows at once it is multiplied by any loss scale


class Scaler:
    """Halves its scale at an overflow, and counts."""

    def __init__(self, scale: float = 2.0**16) -> None:
        self._scale = torch.tensor([scale])
        self.growth_factor, self.backoff_factor = torch.tensor([2.0]), torch.tensor([0.5])
        self._growth_tracker, self._hysteresis_tracker, self.interval = 0, 1, 1000

    @property
    def scale(self) -> torch.Tensor:
        return self._scale

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self._growth_tracker, self._scale = 0, self._scale * self.backoff_factor
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self.interval:
                self._growth_tracker, self._scale = 0, self._scale * self.growth_factor


class Optimizer:
    """Answers `(update_successful, grad_norm, num_zeros)`; after an overflow `(False, None, None)`.

    It decays its weights, so that a step of zero gradients moves them.
    """

    def __init__(self, chunk: nn.Module, scaled: bool = True) -> None:
        self.parameters = list(chunk.parameters())
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.param_groups = [{"params": self.masters, "lr": 0.5}]
        self.grad_scaler = Scaler() if scaled else None
        self.config = SimpleNamespace(overlap_param_gather=False)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.grad_scaler is None else loss * self.grad_scaler.scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.main_grad.zero_()

    def prepare_grads(self) -> bool:
        overflow = any(not parameter.main_grad.isfinite().all() for parameter in self.parameters)
        if self.grad_scaler is not None:
            for parameter in self.parameters:
                parameter.main_grad /= self.grad_scaler.scale
            self.grad_scaler.update(overflow)
        return overflow and self.grad_scaler is not None

    def get_grad_norm(self) -> float:
        return torch.cat([parameter.main_grad.flatten() for parameter in self.parameters]).norm().item()

    def clip_grad_norm(self, clip_grad: float) -> float:
        norm = self.get_grad_norm()
        self.clip(clip_grad, norm)
        return norm

    def clip(self, most: float, norm: float) -> None:
        if (coefficient := most / (norm + 1e-6)) < 1:
            for parameter in self.parameters:
                parameter.main_grad *= coefficient

    def step_with_ready_grads(self) -> bool:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master -= self.param_groups[0]["lr"] * (parameter.main_grad + 0.1 * master)
        return True

    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        norm = self.clip_grad_norm(1.0)
        return self.step_with_ready_grads(), norm, 0


class Chained:
    """Several in a row: one for dense parameters, one for those of experts. Losses have the scale of the first."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.chained_optimizers = list(optimizers)
        self.config = optimizers[0].config
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return self.chained_optimizers[0].scale_loss(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.chained_optimizers:
            optimizer.zero_grad()

    def get_grad_norm(self) -> float:
        return math.hypot(*(optimizer.get_grad_norm() for optimizer in self.chained_optimizers))

    def step_with_ready_grads(self) -> bool:
        for optimizer in self.chained_optimizers:
            optimizer.step_with_ready_grads()
        return True

    def step(self) -> tuple[bool, float | None, int | None]:
        found = [optimizer.prepare_grads() for optimizer in self.chained_optimizers]  # each one, as Megatron does
        if any(found):
            return False, None, None
        norm = self.get_grad_norm()
        for optimizer in self.chained_optimizers:
            optimizer.clip(1.0, norm)
        return self.step_with_ready_grads(), norm, 0


class ColumnParallelLinear(nn.Module):
    """Returns its bias beside the output, as Megatron's linear layers do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden @ self.weight.T, None


class Chunk(nn.Module):
    """A part of a model, with its gradients in FP32 buffers."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(grad_scale_func=None)
        self.ddp_config = SimpleNamespace(overlap_grad_reduce=False)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([ColumnParallelLinear(size), ColumnParallelLinear(size)])
        self.half()
        for parameter in self.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder.layers:
            hidden, _ = layer(hidden)
        return hidden

    def zero_grad_buffer(self) -> None:
        for parameter in self.parameters():
            parameter.main_grad.zero_()

    def backward(self, gradient: float, optimizer: Any) -> None:
        """Gradients as they arrive from a backward pass in float16, of a loss that the optimizer has scaled."""
        scaled = optimizer.scale_loss(torch.tensor(gradient)).half().float()
        for parameter in self.parameters():
            parameter.main_grad += scaled


class Bridge:
    """Builds a configuration and a model, and keeps what it was asked for. Like mbridge's, of bfloat16 unless told."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
        self.dtype = dtype
        self.config = SimpleNamespace(
            params_dtype=dtype, pipeline_dtype=dtype, autocast_dtype=dtype, fp16=False, bf16=True, **config
        )
        self.built: dict[str, Any] = {}

    def set_extra_args(self, **_: Any) -> None:
        pass

    def get_model(self, *, fp16: bool = False, bf16: bool = True, **asked: Any) -> list[Chunk]:
        self.built = {"fp16": fp16, "bf16": bf16, **asked}
        return [Chunk()]


class Provider(SimpleNamespace):
    """Megatron-Bridge's, of bfloat16 unless told."""

    def __init__(self, **config: Any) -> None:
        super().__init__(fp16=False, bf16=True, params_dtype=None, pipeline_dtype=torch.bfloat16, built=None, **config)

    def finalize(self) -> None:
        pass

    def apply_overrides_and_finalize(self, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
        vars(self).update(overrides, params_dtype=dtype)

    def register_pre_wrap_hook(self, hook: Any) -> None:
        pass

    def provide_distributed_model(self, *, ddp_config: Any, **_: Any) -> list[Chunk]:
        self.built = ddp_config
        return [Chunk()]


class ProvidingBridge:
    """Megatron-Bridge: its configuration is a provider."""

    def __init__(self, **config: Any) -> None:
        self.provider = Provider(**config)

    def to_megatron_provider(self, load_weights: bool) -> Provider:
        return self.provider


class Ranks:
    """Megatron's parallel state with one rank in every group."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: 1 if name.endswith("_size") else 0
