"""MismatchStats: merging, the histogram's error bound, non-finite tokens, and agreement with verl's own metrics."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp16_patch.mismatch.stats import QUANTILE_RELATIVE_ERROR, ZERO_BIN, MismatchStats

Batch = tuple[Tensor, Tensor, Tensor]

SUMS = {"d_sum": "d_abs_sum", "sequence_sum": "sequence_abs_sum"}
"""Sums that cancel, each with the sum that gives their scale."""

log_probs = st.floats(min_value=-30.0, max_value=0.0) | st.sampled_from([0.0, -1e-12, math.nan, -math.inf, math.inf])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    size = rows * columns
    sampler = draw(st.lists(log_probs, min_size=size, max_size=size))
    learner = draw(st.lists(log_probs, min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    sampler, learner = (torch.tensor(side, dtype=torch.float64).reshape(rows, columns) for side in (sampler, learner))
    return sampler, learner, torch.tensor(mask, dtype=torch.bool).reshape(rows, columns)


def realistic(noise: float = 7e-3, shape: tuple[int, int] = (16, 64), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sampler = -torch.rand(shape, generator=generator).pow(2) * 6
    learner = sampler + noise * torch.randn(shape, generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return sampler, learner, torch.arange(shape[1]) < lengths


def summary(batch: Batch) -> MismatchStats:
    return MismatchStats.from_log_probs(*batch)


def assert_same(left: MismatchStats, right: MismatchStats) -> None:
    """Equal counts, extremes and histogram; sums equal up to float64 rounding."""
    assert torch.equal(left.histogram, right.histogram)
    for name, value in vars(left).items():
        if name.endswith("_sum") or name == "sequence_abs_max":  # the largest of sums
            scale = getattr(left, SUMS.get(name, name))
            assert getattr(right, name) == pytest.approx(value, rel=1e-12, abs=1e-12 * abs(scale)), name
        elif name != "histogram":
            assert getattr(right, name) == value, name


def test_d_is_learner_minus_sampler() -> None:
    stats = MismatchStats.from_log_probs(torch.tensor([[-2.0]]), torch.tensor([[-1.5]]), torch.tensor([[1]]))

    assert stats.d_sum == stats.d_min == stats.d_max == 0.5
    assert stats.sequence_sum == 0.5
    assert stats.histogram.nonzero().item() > ZERO_BIN
    assert stats.metrics()["mismatch/k1"] == -0.5
    assert stats.metrics()["mismatch/k3"] == pytest.approx(math.exp(0.5) - 1 - 0.5)


@given(batches(), batches())
@settings(deadline=None)
def test_merge_is_commutative(a: Batch, b: Batch) -> None:
    assert_same(summary(a) + summary(b), summary(b) + summary(a))


@given(batches(), batches(), batches())
@settings(deadline=None)
def test_merge_is_associative(a: Batch, b: Batch, c: Batch) -> None:
    assert_same((summary(a) + summary(b)) + summary(c), summary(a) + (summary(b) + summary(c)))


@given(batches(), st.integers(0, 4))
@settings(deadline=None)
def test_merge_equals_one_pass(batch: Batch, cut: int) -> None:
    sampler, learner, mask = batch
    merged = summary((sampler[:cut], learner[:cut], mask[:cut])) + summary((sampler[cut:], learner[cut:], mask[cut:]))

    assert_same(summary(batch), merged)


@given(batches())
@settings(deadline=None)
def test_empty_is_neutral(batch: Batch) -> None:
    stats = summary(batch)

    assert (stats + MismatchStats.empty()).to_dict() == stats.to_dict() == (MismatchStats.empty() + stats).to_dict()


@given(batches())
@settings(deadline=None)
def test_round_trip_through_json_is_exact(batch: Batch) -> None:
    stats = summary(batch)
    restored = MismatchStats.from_dict(json.loads(json.dumps(stats.to_dict(), allow_nan=False)))

    assert restored.to_dict() == stats.to_dict()
    assert torch.equal(restored.histogram, stats.histogram)


def test_merge_leaves_its_operands_alone() -> None:
    a, b = summary(realistic(seed=1)), summary(realistic(seed=2))
    before = a.to_dict()
    a.merge(b)

    assert a.to_dict() == before


@pytest.mark.parametrize("version", [0, 2, None])
def test_unknown_version_is_named(version: int | None) -> None:
    with pytest.raises(ValueError, match=f"version {version}; this release reads 1"):
        MismatchStats.from_dict({"version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown fields: surprise"),
        ({"histogram": {"bins": [9999], "counts": [1]}}, "outside ±1440 bins"),
        ({"histogram": {"bins": [1, 2], "counts": [1]}}, "not one count a bin"),
    ],
)
def test_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MismatchStats.from_dict({**MismatchStats.empty().to_dict(), **change})


@given(st.lists(st.floats(1.001e-9, 999.0) | st.floats(-999.0, -1.001e-9), min_size=1, max_size=60), st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_within_one_percent(differences: list[float], q: float) -> None:
    d = torch.tensor([differences], dtype=torch.float64)
    stats = MismatchStats.from_log_probs(torch.zeros_like(d), d, torch.ones_like(d))

    assert QUANTILE_RELATIVE_ERROR < 0.01
    for estimate, values in ((stats.quantile(q), d), (stats.abs_quantile(q), d.abs())):
        exact = torch.quantile(values, q, interpolation="lower").item()
        assert estimate == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.0, 0.0), (1e-12, 0.0), (-1e-12, 0.0), (1e6, 1e3), (-1e6, -1e3)]
)
def test_histogram_ends(difference: float, expected: float) -> None:
    d = torch.tensor([[difference]], dtype=torch.float64)

    assert MismatchStats.from_log_probs(torch.zeros_like(d), d, torch.ones_like(d)).quantile(0.5) == pytest.approx(
        expected, rel=0.01
    )


@pytest.mark.parametrize("q", [-0.1, 1.1])
def test_quantile_outside_the_unit_interval(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        MismatchStats.empty().quantile(q)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_tokens_are_counted_per_side_and_left_out(bad: float) -> None:
    sampler, learner, _ = realistic(shape=(4, 8))
    mask = torch.ones(4, 8, dtype=torch.int64)
    clean = MismatchStats.from_log_probs(sampler[2:], learner[2:], mask[2:])
    mask[0, 1:], mask[1, 2:] = 0, 0
    sampler[0, 0] = bad
    sampler[1, 0] = learner[1, 0] = bad
    learner[1, 1] = bad
    stats = MismatchStats.from_log_probs(sampler, learner, mask)

    assert (stats.nonfinite_sampler, stats.nonfinite_learner, stats.nonfinite_tokens) == (2, 2, 3)
    assert (stats.sequences, stats.nonfinite_sequences, stats.finite_sequences) == (4, 2, 2)
    assert stats.finite_tokens == clean.tokens == 16
    counts = ("tokens", "sequences", "nonfinite")
    for name, value in clean.metrics(prefix="").items():
        assert name.startswith(counts) or stats.metrics(prefix="")[name] == pytest.approx(value, rel=1e-12)


def test_a_broken_sequence_still_gives_its_finite_tokens() -> None:
    sampler = torch.tensor([[math.nan, -1.0]])
    stats = MismatchStats.from_log_probs(sampler, torch.tensor([[-1.0, -0.75]]), torch.ones(1, 2))

    assert stats.metrics()["mismatch/mean_abs"] == 0.25
    assert math.isnan(stats.metrics()["mismatch/seq_mean_abs"])


def test_what_the_mask_hides_does_not_matter() -> None:
    sampler, learner, mask = realistic()
    hidden = torch.where(mask, sampler, math.nan), torch.where(mask, learner, math.inf)

    assert MismatchStats.from_log_probs(*hidden, mask).to_dict() == summary((sampler, learner, mask)).to_dict()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_no_sampled_token_gives_counts_and_nan(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    metrics = MismatchStats.from_log_probs(zeros, zeros, zeros).metrics(prefix="")
    counts = {"tokens", "sequences", "nonfinite_sampler", "nonfinite_learner", "nonfinite_tokens"}

    assert all(metrics[name] == 0.0 for name in counts)
    assert all(math.isnan(metrics[name]) for name in metrics.keys() - counts)


def test_identical_sides_have_no_mismatch() -> None:
    sampler, _, mask = realistic()
    metrics = MismatchStats.from_log_probs(sampler, sampler, mask).metrics(prefix="")

    zero = ("mean_abs", "max_abs", "abs_p50", "abs_p99_9", "k1", "k3", "seq_max_abs", "prob_max_abs")
    assert [metrics[name] for name in zero] == [0.0] * len(zero)
    assert metrics["pearson"] == pytest.approx(1.0)
    assert metrics["token_mult_prob_error"] == 1.0


def test_pearson_of_a_constant_is_nan() -> None:
    constant = torch.full((2, 50), -0.3)

    assert math.isnan(MismatchStats.from_log_probs(constant, constant, torch.ones(2, 50)).pearson())


def test_huge_differences_stay_finite() -> None:
    lowest = torch.finfo(torch.float32).min
    for sampler, learner in ((0.0, lowest), (lowest, 0.0)):
        stats = MismatchStats.from_log_probs(torch.tensor([[sampler]]), torch.tensor([[learner]]), torch.ones(1, 1))
        finite = {name: value for name, value in stats.metrics().items() if name != "mismatch/pearson"}
        assert all(math.isfinite(value) for value in finite.values()), finite
        assert stats.metrics()["mismatch/k3"] >= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_subtraction_is_in_float64(dtype: torch.dtype) -> None:
    sampler, learner = (torch.tensor([[-1, -3]]).to(dtype), torch.tensor([[-1.0001, -2.0]], dtype=torch.float64))
    stats = MismatchStats.from_log_probs(sampler, learner, torch.tensor([[True, True]]))

    assert stats.d_min == pytest.approx(-1e-4, rel=1e-9)


def test_sequence_ids_join_and_split_rows() -> None:
    sampler = torch.zeros(2, 3)
    learner = torch.tensor([[0.1, 0.2, -1.0], [-2.0, 0.4, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ids = torch.tensor([[7, 7, 8], [8, 3, -1]])
    stats = MismatchStats.from_log_probs(sampler, learner, mask, ids)

    assert stats.sequences == 3
    assert stats.sequence_abs_sum == pytest.approx(0.3 + 3.0 + 0.4)
    assert stats.sequence_abs_max == pytest.approx(3.0)


@given(batches())
@settings(deadline=None)
def test_one_id_a_row_is_the_default(batch: Batch) -> None:
    rows = torch.arange(len(batch[2]))[:, None].expand(batch[2].shape)

    assert_same(summary(batch), MismatchStats.from_log_probs(*batch, rows))


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"sampler \(2, 3\), learner \(2, 4\), mask \(2, 3\)"):
        MismatchStats.from_log_probs(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(sequences, tokens\)"):
        MismatchStats.from_log_probs(torch.zeros(3), torch.zeros(3), torch.zeros(3))


def test_state_is_small() -> None:
    d = torch.logspace(-10, 4, 20_000, dtype=torch.float64)[None, :]
    d = torch.cat([d, -d])
    stats = MismatchStats.from_log_probs(torch.zeros_like(d), d, torch.ones_like(d))

    assert len(pickle.dumps(stats)) < 64 * 1024
    assert len(json.dumps(summary(realistic(shape=(64, 256))).to_dict())) < 16 * 1024


def test_gradients_are_not_tracked() -> None:
    sampler, learner, mask = realistic()

    assert summary((sampler, learner.requires_grad_(), mask)).d_sum


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_summary() -> None:
    batch = realistic()
    stats = MismatchStats.from_log_probs(*(part.cuda() for part in batch))

    assert_same(summary(batch), stats)


def float64_batch() -> Batch:
    """verl computes in the dtype it is given: in float64 only the ``+ 1e-8`` of its masked mean is left."""
    sampler, learner, mask = realistic()
    return sampler.double(), learner.double(), mask


def test_agrees_with_verl_rollout_correction() -> None:
    rollout_corr = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    sampler, learner, mask = float64_batch()
    ours = summary((sampler, learner, mask)).metrics(prefix="")
    theirs = rollout_corr.compute_offpolicy_metrics(learner, sampler, mask)

    assert ours["k1"] == pytest.approx(theirs["kl"], rel=1e-7)
    assert ours["k3"] == pytest.approx(theirs["k3_kl"], rel=1e-7)


def test_agrees_with_verl_debug_metrics() -> None:
    debug = pytest.importorskip("verl.utils.debug.metrics")
    protocol = pytest.importorskip("verl.protocol")
    sampler, learner, mask = float64_batch()
    ours = summary((sampler, learner, mask)).metrics(prefix="")
    tensors = {"rollout_log_probs": sampler, "old_log_probs": learner, "response_mask": mask, "responses": mask}
    theirs = debug.calculate_debug_metrics(protocol.DataProto.from_dict(tensors=tensors))

    assert ours["prob_mean_abs"] == pytest.approx(theirs["training/rollout_probs_diff_mean"], rel=1e-12)
    assert ours["prob_max_abs"] == pytest.approx(theirs["training/rollout_probs_diff_max"], rel=1e-12)
    assert ours["pearson"] == pytest.approx(theirs["training/rollout_actor_probs_pearson_corr"], rel=1e-12)
