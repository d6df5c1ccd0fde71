"""ZeRO optimizers whose norm is not finite, as DeepSpeed writes it, in steps of several groups."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import torch

from fp16_patch.openrlhf.deepspeed.finite_norm import FiniteNormsOnly

pytestmark = pytest.mark.openrlhf


class Optimizer:
    """In the order of ZeRO's: the norms of all groups, then their steps."""

    def __init__(self, *norms: Any) -> None:
        self.norms, self.stepped, self.overflow = norms, [], False

    def get_grad_norm_direct(self, norm: Any) -> Any:
        return norm

    def _optimizer_step(self, group: int) -> None:
        self.stepped.append(group)

    def step(self) -> None:
        for norm in self.norms:
            self.get_grad_norm_direct(norm)
        for group in range(len(self.norms)):
            self._optimizer_step(group)


def stepped(*norms: Any) -> tuple[Optimizer, bool, bool]:
    """The optimizer after a step; whether it was refused, and whether the engine would then count a skipped one."""
    optimizer = Optimizer(*norms)
    with FiniteNormsOnly(optimizer) as guard:
        optimizer.step()
        counted = optimizer.overflow
    return optimizer, guard.refused, counted


@pytest.mark.parametrize("bad", [-1.0, torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor([math.inf])[0]])
def test_no_group_steps_if_the_norm_of_one_is_not_finite(bad: Any) -> None:
    for norms in ((bad, torch.tensor(2.0)), (torch.tensor(2.0), bad)):
        optimizer, refused, counted = stepped(*norms)
        assert (optimizer.stepped, refused, counted) == ([], True, True)
        assert vars(optimizer).keys() == {"norms", "stepped", "overflow"}
        assert not optimizer.overflow


def test_every_group_steps_if_all_norms_are_finite() -> None:
    beyond_fp32 = torch.tensor(1e40, dtype=torch.float64)
    optimizer, refused, counted = stepped(torch.tensor(0.0), beyond_fp32)
    assert (optimizer.stepped, refused, counted) == ([0, 1], False, False)


def test_an_optimizer_of_another_kind_is_left_alone() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with FiniteNormsOnly(optimizer) as guard:
        optimizer.step()
    assert not guard.refused


def test_what_another_rank_refuses_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp16_patch.openrlhf.deepspeed.finite_norm.max_over_ranks", torch.ones_like)
    optimizer, refused, _ = stepped(torch.tensor(1.0))
    assert (optimizer.stepped, refused) == ([], True)
