"""Gradients on the host, under a scaler whose scale is on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode

from fp16_patch import Plan
from fp16_patch.scaling.offloaded_gradients import gradients_on_host
from fp16_patch.scaling.scaler import sharded_scaler


class Calls(TorchFunctionMode):
    """Lists what torch is asked to do, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def optimizer_with(gradient: Any) -> Any:
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    return torch.optim.SGD([weight], lr=1.0)


def test_scale_and_flag_are_on_the_host_before_they_are_read() -> None:
    scaler = sharded_scaler(Plan(init_scale=8.0), "cpu")
    scaler.scale(torch.ones(1, requires_grad=True).sum())
    with Calls() as calls:
        scaler.unscale_(optimizer_with(torch.full((2,), 16.0)))
    read = next(place for place, name in enumerate(calls.names) if "unscale" in name)
    assert calls.names[:read].count("cpu") == 2


@pytest.mark.parametrize("gradient", [16.0, float("inf")])
def test_gradients_are_unscaled_and_overflows_found(gradient: float) -> None:
    scaler, optimizer = sharded_scaler(Plan(init_scale=8.0), "cpu"), optimizer_with(torch.full((2,), gradient))
    scaler.scale(torch.ones(1, requires_grad=True).sum())
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    (weight,) = optimizer.param_groups[0]["params"]
    overflowed = gradient == float("inf")
    assert weight.tolist() == [0.0 if overflowed else -2.0] * 2
    assert scaler.get_scale() == (4.0 if overflowed else 8.0)


def test_gradients_elsewhere_are_left_to_torch() -> None:
    assert gradients_on_host(optimizer_with(torch.ones(2)))
    assert not gradients_on_host(optimizer_with(torch.ones(2, device="meta")))
