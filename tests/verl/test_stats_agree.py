"""What MismatchStats calls by verl's names is what verl's own functions give for the same tensors."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verl

torch = pytest.importorskip("torch")

from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo import rollout_corr_helper
from verl.utils.debug.metrics import calculate_debug_metrics

from fp16_patch.mismatch.statistics.summary import MismatchStats

NOISE = {"like bf16": 7e-3, "stale": 0.5, "broken": 12.0}


@pytest.fixture(params=NOISE.values(), ids=NOISE.keys())
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Sampler, learner and mask, in float64: verl computes in the dtype it is given, and adds 1e-8 to its counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (12, 40)
    sampler = -torch.rand(shape, generator=generator, dtype=torch.float64).pow(2) * 6
    learner = sampler + request.param * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return sampler, learner, (torch.arange(shape[1]) < lengths).long()


def assert_agree(ours: dict[str, float], theirs: dict[str, float], prefix: str) -> None:
    assert theirs
    for name, value in theirs.items():
        assert ours[prefix + name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


def test_off_policy_metrics(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    sampler, learner, mask = batch
    ours = MismatchStats.from_log_probs(sampler, learner, mask).aliases()

    assert_agree(ours, rollout_corr_helper.compute_offpolicy_metrics(learner, sampler, mask), "rollout_corr/")


def test_importance_weights(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    sampler, learner, mask = batch
    ours = MismatchStats.from_log_probs(sampler, learner, mask).aliases()
    _, theirs = rollout_corr_helper.compute_rollout_correction_weights(learner - sampler, mask)

    assert_agree(ours, theirs, "rollout_corr/")


def test_every_name_is_one_of_verls(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    sampler, learner, mask = batch
    ours = MismatchStats.from_log_probs(sampler, learner, mask).aliases()
    theirs = {
        **rollout_corr_helper.compute_offpolicy_metrics(learner, sampler, mask),
        **rollout_corr_helper.compute_rollout_correction_weights(learner - sampler, mask)[1],
    }

    assert {name for name in ours if name.startswith("rollout_corr/")} == {f"rollout_corr/{name}" for name in theirs}


def test_debug_metrics(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    sampler, learner, mask = batch
    ours = MismatchStats.from_log_probs(sampler, learner, mask).aliases()
    tensors = {"rollout_log_probs": sampler, "old_log_probs": learner, "response_mask": mask, "responses": mask}

    assert_agree(ours, calculate_debug_metrics(DataProto.from_dict(tensors=tensors)), "")
    assert {name for name in ours if name.startswith("training/")} == calculate_debug_metrics(
        DataProto.from_dict(tensors=tensors)
    ).keys()
