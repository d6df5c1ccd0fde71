"""MismatchStats: merging, the histograms' error bounds, non-finite tokens, what is kept of bands and worst tokens."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp16_patch.mismatch.statistics import measure
from fp16_patch.mismatch.statistics.layout import COUNT_TABLES, COUNTS, SCALARS, SLICES, TABLES, WORST_TOKENS
from fp16_patch.mismatch.statistics.summary import QUANTILE_RELATIVE_ERROR, STATE_SIZE, ZERO_BIN, MismatchStats
from fp16_patch.mismatch.statistics.tokens import padded
from tests.live_bytes import LiveBytes

Batch = tuple[Tensor, Tensor, Tensor]

VERSION_1 = {
    "version": 1,
    "tokens": 6,
    "sequences": 2,
    "nonfinite_sampler": 1,
    "nonfinite_learner": 1,
    "nonfinite_tokens": 2,
    "nonfinite_sequences": 1,
    "d_sum": -0.25,
    "d_abs_sum": 0.75,
    "d_square_sum": 0.3125,
    "d_min": -0.5,
    "d_max": 0.25,
    "k3_sum": 0.14055607640037493,
    "expm1_abs_sum": 0.9327466873878697,
    "sampler_prob_sum": 1.992242286705284,
    "learner_prob_sum": 2.1112621254513417,
    "sampler_prob_square_sum": 1.3003311463681944,
    "learner_prob_square_sum": 1.5274046730197366,
    "prob_product_sum": 1.3976116155872749,
    "prob_abs_sum": 0.22552040797148537,
    "prob_abs_max": 0.17227012335877145,
    "sequence_sum": -0.25,
    "sequence_abs_sum": 0.25,
    "sequence_square_sum": 0.0625,
    "sequence_abs_max": 0.25,
    "histogram": {"bins": [-1044, 0, 1008], "counts": [1, 2, 1]},
}
"""What version 1 wrote of the batch below."""

VERSION_1_BATCH = (
    torch.tensor([[-0.5, -2.0, -0.125], [-1.0, math.nan, -3.0]]),
    torch.tensor([[-0.25, -2.5, -0.125], [-1.0, -1.0, -math.inf]]),
    torch.ones(2, 3),
)

log_probs = st.floats(min_value=-30.0, max_value=0.0) | st.sampled_from([0.0, -1e-12, math.nan, -math.inf, math.inf])
coarse = st.sampled_from([0.0, -0.5, -1.0, -2.0, math.nan])
"""So few values that most tokens tie in |d|."""


@st.composite
def batches(draw: st.DrawFn, values: st.SearchStrategy[float] = log_probs, columns: int = 5) -> Batch:
    rows, width = draw(st.integers(0, 4)), draw(st.integers(1, columns))
    size = rows * width
    sampler = draw(st.lists(values, min_size=size, max_size=size))
    learner = draw(st.lists(values, min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    sampler, learner = (torch.tensor(side, dtype=torch.float64).reshape(rows, width) for side in (sampler, learner))
    return sampler, learner, torch.tensor(mask, dtype=torch.bool).reshape(rows, width)


def realistic(noise: float = 7e-3, shape: tuple[int, int] = (16, 64), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sampler = -torch.rand(shape, generator=generator).pow(2) * 6
    learner = sampler + noise * torch.randn(shape, generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return sampler, learner, torch.arange(shape[1]) < lengths


def summary(batch: Batch, first_sequence: int = 0) -> MismatchStats:
    return MismatchStats.from_log_probs(*batch, first_sequence=first_sequence)


def of_differences(rows: list[list[float]]) -> MismatchStats:
    d = torch.tensor(rows, dtype=torch.float64)
    return MismatchStats.from_log_probs(torch.zeros_like(d), d, torch.ones_like(d))


def edge(mask: list[bool], place: int, sampled: list[int]) -> str | None:
    """Which edge of its sequence the place is."""
    if place in (sampled[0], sampled[-1]):
        return "first" if place == sampled[0] else "last"
    return "after a gap" if not mask[place - 1] else "before a gap" if not mask[place + 1] else None


def tokens_of(batch: Batch) -> list[dict[str, float]]:
    """Every finite token by itself, in plain Python."""
    found = []
    for sequence, (sampler, learner, mask) in enumerate(zip(*(part.tolist() for part in batch), strict=True)):
        sampled = [place for place, here in enumerate(mask) if here]
        for place in sampled:
            if math.isfinite(sampler[place]) and math.isfinite(learner[place]):
                found.append(
                    {
                        "d": learner[place] - sampler[place],
                        "sampler": sampler[place],
                        "learner": learner[place],
                        "sequence": sequence,
                        "position": place - sampled[0],
                        "edge": edge(mask, place, sampled),
                    }
                )
    return found


def assert_same(left: MismatchStats, right: MismatchStats) -> None:
    """Equal counts, extremes and worst tokens; sums equal up to float64 rounding of what was summed."""
    rounding = 1e-12 * (1 + left.tokens + left.d_abs_sum + left.expm1_abs_sum)
    for name in SCALARS:
        value = getattr(left, name)
        same = value if name in COUNTS else pytest.approx(value, rel=1e-11, abs=rounding)
        assert getattr(right, name) == same, name
    for name in TABLES:
        ours, theirs = left.vector[SLICES[name]], right.vector[SLICES[name]]
        if name in COUNT_TABLES or name.endswith("d_abs_max"):
            assert torch.equal(ours, theirs), name
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=rounding), name
    assert torch.equal(left.histogram, right.histogram)
    assert left.worst_tokens() == right.worst_tokens()


def test_d_is_learner_minus_sampler() -> None:
    stats = MismatchStats.from_log_probs(torch.tensor([[-2.0]]), torch.tensor([[-1.5]]), torch.tensor([[1]]))
    metrics = stats.metrics()

    assert stats.d_sum == stats.d_min == stats.d_max == 0.5
    assert stats.sequence_sum == 0.5
    assert stats.histogram.nonzero().item() > ZERO_BIN
    assert stats.worst_tokens()[0].d == 0.5
    assert stats.position_bands()[0].d_mean == stats.probability_bands()[0].d_mean == stats.by_length()[0].mean == 0.5
    assert metrics["mismatch/k1"] == -0.5
    assert metrics["mismatch/k3"] == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert metrics["mismatch/k3_reverse"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert metrics["mismatch/is_mean"] == pytest.approx(math.exp(0.5))
    assert stats.aliases()["rollout_corr/log_ppl_diff"] == -0.5


@given(batches(), batches())
@settings(deadline=None)
def test_merge_is_commutative(a: Batch, b: Batch) -> None:
    assert_same(summary(a) + summary(b), summary(b) + summary(a))


@given(batches(coarse), batches(coarse), batches(coarse))
@settings(deadline=None)
def test_merge_is_associative(a: Batch, b: Batch, c: Batch) -> None:
    assert_same((summary(a) + summary(b)) + summary(c), summary(a) + (summary(b) + summary(c)))


@given(batches(), st.integers(0, 4))
@settings(deadline=None)
def test_merge_equals_one_pass(batch: Batch, cut: int) -> None:
    upper, lower = (tuple(part[rows] for part in batch) for rows in (slice(cut), slice(cut, None)))
    cut = min(cut, len(batch[0]))

    assert_same(summary(batch), summary(upper) + summary(lower, first_sequence=cut))


@given(batches(log_probs | coarse))
@settings(deadline=None)
def test_merge_all_equals_one_pass(batch: Batch) -> None:
    rows = range(len(batch[0]))
    parts = (summary(tuple(part[row : row + 1] for part in batch), first_sequence=row) for row in rows)

    assert_same(summary(batch), MismatchStats.merge_all(parts))


def test_many_states_merge_into_one() -> None:
    sampler, learner, mask = realistic(shape=(300, 7))
    rows = [summary((sampler[row, None], learner[row, None], mask[row, None]), row) for row in range(300)]

    assert_same(summary((sampler, learner, mask)), MismatchStats.merge_all(rows))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = realistic()
    whole = summary(batch)
    monkeypatch.setattr(measure, "CPU_CHUNK", 100)

    assert_same(whole, summary(batch))


@given(batches())
@settings(deadline=None)
def test_empty_is_neutral(batch: Batch) -> None:
    stats = summary(batch)

    assert (stats + MismatchStats.empty()).to_dict() == stats.to_dict() == (MismatchStats.empty() + stats).to_dict()
    assert MismatchStats.merge_all([]).to_dict() == MismatchStats.empty().to_dict()


@pytest.mark.parametrize(
    "restored",
    [
        lambda stats: MismatchStats.from_dict(json.loads(json.dumps(stats.to_dict(), allow_nan=False))),
        lambda stats: MismatchStats.from_bytes(stats.to_bytes()),
        lambda stats: pickle.loads(pickle.dumps(stats)),
        lambda stats: stats.to_host(),
    ],
    ids=["json", "bytes", "pickle", "host"],
)
@given(batch=batches())
@settings(deadline=None)
def test_round_trips_are_exact(restored: Callable[[MismatchStats], MismatchStats], batch: Batch) -> None:
    stats = summary(batch)

    assert torch.equal(restored(stats).vector, stats.vector)
    assert restored(stats).to_dict() == stats.to_dict()


def test_version_1_is_read() -> None:
    stats = MismatchStats.from_dict(VERSION_1)
    old, new = stats.metrics(prefix=""), summary(VERSION_1_BATCH).metrics(prefix="")

    assert old["mean_abs"] == new["mean_abs"] == 0.1875
    assert {name for name in old if math.isnan(old[name])} == {
        *("tail_1e_2", "tail_1e_1", "tail_1", "k3_reverse", "is_mean", "is_std", "ess", "chi2_token"),
        *("tis_clip_fraction", "icepop_mask_fraction", "log_prob_slope", "log_prob_correlation"),
        *("seq_is_mean", "seq_ess", "seq_mask_fraction", "chi2_seq"),
    }
    assert all(math.isnan(old[name]) or old[name] == pytest.approx(new[name], rel=1e-12) for name in old)
    assert stats.worst_tokens() == stats.probability_bands() == stats.position_bands() == stats.by_length() == []
    assert MismatchStats.from_dict(stats.to_dict()).to_dict() == {**VERSION_1, "version": 3, "worst": []}


def test_what_version_1_lacks_is_of_the_other_tokens() -> None:
    batch = realistic()
    alone, mixed = summary(batch), summary(batch) + MismatchStats.from_dict(VERSION_1)

    assert mixed.finite_tokens == alone.finite_tokens + 4
    assert mixed.metrics()["mismatch/mean_abs"] != alone.metrics()["mismatch/mean_abs"]
    for name in ("ess", "chi2_seq", "log_prob_slope", "tail_1e_2"):
        assert mixed.metrics()[f"mismatch/{name}"] == alone.metrics()[f"mismatch/{name}"]


def test_merge_leaves_its_operands_alone() -> None:
    a, b = summary(realistic(seed=1)), summary(realistic(seed=2))
    before = a.to_dict()
    a.merge(b)

    assert a.to_dict() == before


@pytest.mark.parametrize("version", [0, 4, None])
def test_unknown_version_is_named(version: int | None) -> None:
    with pytest.raises(ValueError, match=f"version {version}; this release reads 1, 2 and 3"):
        MismatchStats.from_dict({"version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "version 3 has unknown fields: surprise"),
        ({"histogram": {"bins": [9999], "counts": [1]}}, "outside ±1440 bins"),
        ({"histogram": {"bins": [1, 2], "counts": [1]}}, "not one count a bin"),
        ({"joint": {"cells": [-1], "values": [1]}}, "joint outside 2116 cells"),
        ({"position_d": {"cells": [1, 2], "values": [1.0]}}, "not one value a cell"),
        ({"worst": [[0.0, 1.0]]}, "up to 16 rows of 5 numbers"),
    ],
)
def test_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MismatchStats.from_dict({**MismatchStats.empty().to_dict(), **change})


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda whole: b"", "it begins with b''"),
        (lambda whole: whole[:6] + b"\x01" + whole[7:], "not a mismatch state of version 3"),
        (lambda whole: whole[:-20], "damaged"),
        (lambda whole: whole[:30] + b"\xff\xff" + whole[32:], "damaged"),
    ],
)
def test_damaged_bytes_are_refused(damaged: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MismatchStats.from_bytes(damaged(summary(realistic()).to_bytes()))


@given(st.lists(st.floats(1.001e-9, 999.0) | st.floats(-999.0, -1.001e-9), min_size=1, max_size=60), st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_within_one_percent(differences: list[float], q: float) -> None:
    d = torch.tensor([differences], dtype=torch.float64)
    stats = of_differences([differences])

    assert QUANTILE_RELATIVE_ERROR < 0.01
    for estimate, values in ((stats.quantile(q), d), (stats.abs_quantile(q), d.abs())):
        exact = torch.quantile(values, q, interpolation="lower").item()
        assert estimate == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.0, 0.0), (1e-12, 0.0), (-1e-12, 0.0), (1e6, 1e3), (-1e6, -1e3)]
)
def test_histogram_ends(difference: float, expected: float) -> None:
    assert of_differences([[difference]]).quantile(0.5) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("q", [-0.1, 1.1])
def test_quantile_outside_the_unit_interval(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        MismatchStats.empty().quantile(q)


@given(batches(coarse | log_probs, columns=40))
@settings(deadline=None)
def test_worst_tokens_are_those_of_a_sort(batch: Batch) -> None:
    everything = sorted(tokens_of(batch), key=lambda token: (-abs(token["d"]), token["sequence"], token["position"]))
    worst = [vars(token) | {"token_id": 0} for token in summary(batch).worst_tokens()]

    assert worst == [
        {name: value for name, value in token.items() if name != "edge"} | {"token_id": 0}
        for token in everything[:WORST_TOKENS]
    ]


def test_worst_tokens_of_a_large_batch() -> None:
    batch = realistic(shape=(200, 300))
    everything = sorted(tokens_of(batch), key=lambda token: -abs(token["d"]))

    worst = [(token.sequence, token.position) for token in summary(batch).worst_tokens()]
    assert worst == [(token["sequence"], token["position"]) for token in everything[:WORST_TOKENS]]


def test_worst_tokens_are_named() -> None:
    sampler, learner, mask = torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4)
    mask[1, 0] = 0
    learner[1, 3] = 0.5
    stats = MismatchStats.from_log_probs(
        sampler, learner, mask, token_ids=torch.arange(8).reshape(2, 4), first_sequence=10
    )
    worst, unnamed = stats.worst_tokens()[0], MismatchStats.from_log_probs(sampler, learner, mask).worst_tokens()[0]

    assert (worst.d, worst.sequence, worst.position, worst.token_id) == (0.5, 11, 2, 7)
    assert (unnamed.sequence, unnamed.token_id) == (1, -1)


@given(batches(columns=12))
@settings(deadline=None)
def test_position_bands_hold_each_token_once(batch: Batch) -> None:
    def label(token: dict[str, float]) -> str:
        if token["edge"]:
            return token["edge"]
        low = 2 ** int(math.log2(token["position"]))
        return "1" if low == 1 else f"{low}–{2 * low - 1}"

    everything = tokens_of(batch)
    bands = {band.label: band for band in summary(batch).position_bands()}

    assert bands.keys() == {label(token) for token in everything}
    for name, band in bands.items():
        differences = [token["d"] for token in everything if label(token) == name]
        assert band.tokens == len(differences)
        assert band.d_abs_max == max(map(abs, differences))
        assert band.d_mean == pytest.approx(sum(differences) / band.tokens, abs=1e-12)
        assert band.d_abs_mean == pytest.approx(sum(map(abs, differences)) / band.tokens)
        assert band.d_square_mean == pytest.approx(sum(d * d for d in differences) / band.tokens)


@given(batches(columns=12))
@settings(deadline=None)
def test_edges_are_set_against_tokens_as_likely(batch: Batch) -> None:
    everything, stats = tokens_of(batch), summary(batch)
    rest = [token for token in everything if token["edge"] is None]

    assert {edge.band.label: edge.band.tokens for edge in stats.edges()} == Counter(
        token["edge"] for token in everything if token["edge"] is not None
    )
    for found in stats.edges():
        if rest:
            assert found.rest_abs_mean == pytest.approx(sum(abs(token["d"]) for token in rest) / len(rest), abs=1e-9)


def test_an_edge_is_expected_to_have_the_gap_of_tokens_as_likely() -> None:
    """First tokens are unsure and the others mostly sure: both have the gap of their probability."""
    unsure, sure = math.log(0.3), math.log(0.99)
    sampler = torch.tensor([[unsure, sure, sure, sure, unsure, sure]] * 8, dtype=torch.float64)
    gap = torch.where(sampler == unsure, 0.1, 0.001)
    first, last = MismatchStats.from_log_probs(sampler, sampler + gap, torch.ones_like(sampler)).edges()

    assert first.band.d_abs_mean == pytest.approx(first.expected_abs_mean) == pytest.approx(0.1)
    assert last.band.d_abs_mean == pytest.approx(last.expected_abs_mean) == pytest.approx(0.001)
    assert first.rest_abs_mean == pytest.approx((3 * 0.001 + 0.1) / 4)
    alone = MismatchStats.from_log_probs(sampler[:, :4], (sampler + gap)[:, :4], torch.ones(8, 4)).edges()[0]
    assert math.isnan(alone.expected_abs_mean), "no other token is as unsure"


def test_nan_of_the_sampler_where_the_learner_is_certain_is_counted() -> None:
    sampler = [math.nan, math.nan, math.nan, -math.inf, -0.1, math.nan]
    learner = [-1e-4, -0.5, -2e-4, -1e-4, math.nan, math.nan]
    batch = torch.tensor([sampler]), torch.tensor([learner]), torch.ones(1, 6)
    stats = summary(batch)

    assert (stats.nonfinite_tokens, stats.nonfinite_certain) == (6, 2)
    assert stats.metrics()["mismatch/nonfinite_certain"] == 2
    swapped = MismatchStats.from_log_probs(batch[1], batch[0], batch[2])
    assert swapped.nonfinite_certain == 0, "the learner's NaN is no artefact of the sampler"


def test_what_is_no_log_prob_is_counted_by_side() -> None:
    values = torch.tensor([[0.0, 1e-3, 0.1, 0.6, 12.0, -3.0]])
    stats = MismatchStats.from_log_probs(values, -values.abs(), torch.tensor([[1, 1, 1, 1, 0, 1]]))

    assert (stats.sampler_positive_count, stats.learner_positive_count) == (1, 0)
    assert stats.metrics()["mismatch/positive_sampler"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_on_a_coarser_grid_are_counted(dtype: torch.dtype) -> None:
    sampler, learner, mask = realistic()
    stats = MismatchStats.from_log_probs(sampler.to(dtype), learner, mask)
    name = str(dtype).removeprefix("torch.")

    assert getattr(stats, f"sampler_{name}_count") == stats.sampler_nonzero_count == stats.tokens
    assert getattr(stats, f"learner_{name}_count") < 0.1 * stats.tokens
    # As JSON writes them, they are read in float64.
    written = torch.tensor(json.loads(json.dumps(sampler.to(dtype).tolist())), dtype=torch.float64)
    read = MismatchStats.from_log_probs(written, learner, mask)
    assert getattr(read, f"sampler_{name}_count") == stats.tokens


def test_probability_bands_are_of_the_sampler() -> None:
    probabilities = torch.tensor([[5e-5, 2e-4, 0.05, 0.2, 0.499, 0.501, 0.95, 0.9999]], dtype=torch.float64)
    learner = probabilities.log() - torch.tensor([[1, 2, 3, 4, 6, 5, 6, 7]])
    bands = MismatchStats.from_log_probs(probabilities.log(), learner, torch.ones(1, 8)).probability_bands()

    labels = ["0–0.0001", "0.0001–0.001", "0.01–0.1", "0.1–0.5", "0.5–0.9", "0.9–0.99", "0.999–1"]
    assert [band.label for band in bands] == labels
    assert [band.tokens for band in bands] == [1, 1, 1, 2, 1, 1, 1]
    assert [band.d_mean for band in bands] == pytest.approx([-1, -2, -3, -5, -5, -6, -7])
    assert [band.d_abs_max for band in bands] == pytest.approx([1, 2, 3, 6, 5, 6, 7])


def test_joint_histogram_finds_the_bin_of_both_sides() -> None:
    edges = MismatchStats.probability_edges()
    centres = (edges[:-1] + edges[1:]) / 2
    sampler, learner = centres.repeat_interleave(len(centres)).log(), centres.repeat(len(centres)).log()
    joint = MismatchStats.from_log_probs(sampler[None], learner[None], torch.ones(1, len(learner))).joint_probability()

    assert (edges[0], edges[-1]) == (0.0, 1.0)
    assert (edges.diff() > 0).all()
    assert torch.equal(joint, torch.ones(len(centres), len(centres), dtype=torch.int64))


@pytest.mark.parametrize(("log_prob", "cell"), [(0.0, -1), (-1e-12, -1), (1e-3, -1), (-1e4, 0), (-1e30, 0)])
def test_joint_histogram_ends(log_prob: float, cell: int) -> None:
    side = torch.tensor([[log_prob]], dtype=torch.float64)

    assert MismatchStats.from_log_probs(side, side, torch.ones(1, 1)).joint_probability()[cell, cell] == 1


def test_d_of_sequences_by_length() -> None:
    d = torch.tensor([[0.5, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0], [0.1, 0.2, 0, 0, 0], [1.0, 1.0, 1.0, 1.0, 4.0]])
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    stats = MismatchStats.from_log_probs(torch.zeros_like(d), d, mask)
    short, middle, long = stats.by_length()

    assert [(band.low, band.high, band.sequences) for band in (short, middle, long)] == [
        (1, 2, 2),
        (2, 4, 1),
        (4, 8, 1),
    ]
    assert (short.mean, short.mean_abs, short.std, short.max_abs) == (-0.25, 0.75, 0.75, 1.0)
    assert (middle.mean, long.mean, long.std) == (pytest.approx(0.3), 8.0, 0.0)


def test_density_of_d_and_length() -> None:
    sums, lengths = torch.tensor([0.0, 3e-4, -0.02, 7.0, -1e9]), torch.tensor([1, 2, 3, 9, 1])
    d = torch.zeros(5, 9, dtype=torch.float64)
    d[:, 0] = sums
    density = MismatchStats.from_log_probs(torch.zeros_like(d), d, torch.arange(9) < lengths[:, None]).length_density()
    rows, columns = density.nonzero().unbind(1)
    edges = MismatchStats.sum_edges()

    assert density.shape == (len(MismatchStats.length_edges()) - 1, len(edges) - 1)
    assert density.sum() == 5
    assert [MismatchStats.length_edges()[row].item() for row in rows] == [1, 1, 2, 2, 8]
    assert columns.tolist() == [0, 32, *(torch.bucketize(torch.tensor([-0.02, 3e-4, 7.0]), edges) - 1).tolist()]


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
    assert stats.aliases() == pytest.approx(clean.aliases(), rel=1e-12)
    assert stats.position_bands() == clean.position_bands()
    assert torch.equal(stats.joint_probability(), clean.joint_probability())


@given(batches())
@settings(deadline=None)
def test_nothing_but_finite_numbers_is_kept(batch: Batch) -> None:
    stats = summary(batch)

    assert stats.finite_tokens == len(tokens_of(batch))
    if stats.finite_sequences:
        assert stats.vector.isfinite().all()
    assert not stats.vector.isnan().any()


def test_a_broken_sequence_still_gives_its_finite_tokens() -> None:
    sampler = torch.tensor([[math.nan, -1.0]])
    stats = MismatchStats.from_log_probs(sampler, torch.tensor([[-1.0, -0.75]]), torch.ones(1, 2))

    assert stats.metrics()["mismatch/mean_abs"] == 0.25
    assert math.isnan(stats.metrics()["mismatch/seq_mean_abs"])
    assert [band.label for band in stats.position_bands()] == ["last"]


def test_what_the_mask_hides_does_not_matter() -> None:
    sampler, learner, mask = realistic()
    hidden = torch.where(mask, sampler, math.nan), torch.where(mask, learner, math.inf)

    assert MismatchStats.from_log_probs(*hidden, mask).to_dict() == summary((sampler, learner, mask)).to_dict()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
@pytest.mark.parametrize("ids", [False, True])
def test_no_sampled_token_gives_counts_and_nan(shape: tuple[int, int], ids: bool) -> None:
    zeros = torch.zeros(shape)
    stats = MismatchStats.from_log_probs(zeros, zeros, zeros, zeros.long() if ids else None)
    metrics, aliases = stats.metrics(prefix=""), stats.aliases()
    counts = {"tokens", "sequences", "nonfinite_sampler", "nonfinite_learner", "nonfinite_tokens"}
    counts |= {"nonfinite_certain", "positive_sampler", "positive_learner"}

    assert all(metrics[name] == 0.0 for name in counts)
    assert all(math.isnan(metrics[name]) for name in metrics.keys() - counts)
    assert [name for name in aliases if not math.isnan(aliases[name])] == ["training/rollout_probs_diff_valid"]
    assert stats.worst_tokens() == stats.probability_bands() == stats.position_bands() == stats.by_length() == []
    assert stats.to_dict() == MismatchStats.empty().to_dict()


def test_identical_sides_have_no_mismatch() -> None:
    sampler, _, mask = realistic()
    metrics = MismatchStats.from_log_probs(sampler, sampler, mask).metrics(prefix="")

    zero = ("mean_abs", "max_abs", "abs_p50", "abs_p99_9", "k1", "k3", "k3_reverse", "seq_max_abs", "prob_max_abs")
    zero += ("is_std", "chi2_token", "chi2_seq", "tail_1e_2", "tis_clip_fraction", "seq_mask_fraction")
    one = ("is_mean", "is_min", "is_max", "ess", "seq_is_mean", "seq_ess", "token_mult_prob_error")
    assert [metrics[name] for name in zero] == [0.0] * len(zero)
    assert [metrics[name] for name in one] == [1.0] * len(one)
    assert metrics["pearson"] == pytest.approx(1.0)
    assert metrics["log_prob_slope"] == pytest.approx(1.0)
    assert metrics["log_prob_correlation"] == pytest.approx(1.0)


def test_importance_weights() -> None:
    sampler, learner, mask = (part.double() for part in realistic(noise=0.9))
    mask = mask.bool()
    d = (learner - sampler)[mask]
    r, n = d.exp(), d.numel()
    sums = ((learner - sampler) * mask).sum(1)
    stats = summary((sampler, learner, mask))
    metrics = stats.metrics(prefix="")

    assert metrics["is_mean"] == pytest.approx(r.mean().item())
    assert metrics["is_std"] == pytest.approx(r.std(correction=0).item())
    assert (metrics["is_min"], metrics["is_max"]) == pytest.approx((r.min().item(), r.max().item()))
    assert metrics["ess"] == pytest.approx((r.sum() ** 2 / (n * r.square().sum())).item())
    assert metrics["chi2_token"] == pytest.approx((r.square().mean() - 1).item())
    assert metrics["k3_reverse"] == pytest.approx((torch.exp(-d) - 1 + d).mean().item())
    assert metrics["tis_clip_fraction"] == pytest.approx((r > 2).double().mean().item())
    assert metrics["icepop_mask_fraction"] == pytest.approx(((r < 0.5) | (r > 5)).double().mean().item())
    for name, threshold in (("tail_1e_2", 0.01), ("tail_1e_1", 0.1), ("tail_1", 1.0)):
        assert metrics[name] == pytest.approx((d.abs() > threshold).double().mean().item())
    assert stats.is_standard_error() == pytest.approx((r.std() / n**0.5).item())
    weights = sums.exp()
    assert metrics["seq_is_mean"] == pytest.approx(weights.mean().item())
    assert metrics["seq_ess"] == pytest.approx((weights.sum() ** 2 / (16 * weights.square().sum())).item())
    assert metrics["seq_mask_fraction"] == ((weights < 0.5) | (weights > 2)).double().mean().item()


def test_a_threshold_is_not_beyond_itself() -> None:
    metrics = of_differences([[1.0, -1.0, 1.0 + 1e-12]]).metrics(prefix="")

    assert metrics["tail_1"] == pytest.approx(1 / 3)


def test_small_differences_do_not_cancel() -> None:
    metrics = of_differences([[1e-7, -1e-7] * 50]).metrics(prefix="")

    assert metrics["chi2_token"] == pytest.approx(2e-14, rel=1e-6, abs=0.0)
    assert [metrics["k3"], metrics["k3_reverse"]] == pytest.approx([5e-15] * 2, rel=1e-6, abs=0.0)
    assert metrics["is_std"] == pytest.approx(1e-7, rel=1e-6)


def test_line_through_the_log_probs() -> None:
    sampler, _, mask = realistic()
    learner = sampler.double() * 0.9 - 0.01
    stats = MismatchStats.from_log_probs(sampler, learner, mask)

    assert stats.log_prob_slope() == pytest.approx(0.9)
    assert stats.log_prob_correlation() == pytest.approx(1.0)


def test_trl_and_nemo_rl_formulas() -> None:
    """As ``GRPOTrainer`` of TRL (token level, before the cap) and ``ClippedPGLossFn`` of NeMo-RL state them."""
    sampler, learner, mask = realistic(noise=0.5)
    sampler, learner = sampler.double()[mask], learner.double()[mask]
    mixture = torch.log((sampler.exp() + learner.exp()) / 2)

    def k3(log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() - 1 - log_ratio

    expected = {
        "sampling/sampling_logp_difference/mean": (learner - sampler).abs().mean(),
        "sampling/sampling_logp_difference/max": (learner - sampler).abs().max(),
        "sampling/importance_sampling_ratio/min": (learner - sampler).exp().min(),
        "sampling/importance_sampling_ratio/mean": (learner - sampler).exp().mean(),
        "sampling/importance_sampling_ratio/max": (learner - sampler).exp().max(),
        "token_mult_prob_error": (learner - sampler).abs().exp().mean(),
        "gen_kl_error": k3(learner - sampler).mean(),
        "policy_kl_error": k3(sampler - learner).mean(),
        "js_divergence_error": (k3(learner - mixture) / 2 + k3(sampler - mixture) / 2).mean(),
        "sampling_importance_ratio": (learner - sampler).exp().mean(),
    }
    aliases = summary(realistic(noise=0.5)).aliases()
    for name, value in expected.items():
        assert aliases[name] == pytest.approx(value.item(), rel=1e-6), name


def test_pearson_of_a_constant_is_nan() -> None:
    constant = torch.full((2, 50), -0.3)
    stats = MismatchStats.from_log_probs(constant, constant, torch.ones(2, 50))

    assert math.isnan(stats.pearson())
    assert math.isnan(stats.log_prob_correlation())
    assert math.isnan(stats.log_prob_slope())


@pytest.mark.parametrize("lowest", [-40.0, -100.0, torch.finfo(torch.float32).min])
def test_huge_differences_stay_finite(lowest: float) -> None:
    undefined = ("pearson", "log_prob", "is_standard")
    for sampler, learner in ((0.0, lowest), (lowest, 0.0)):
        stats = MismatchStats.from_log_probs(torch.tensor([[sampler]]), torch.tensor([[learner]]), torch.ones(1, 1))
        metrics = {name: value for name, value in stats.metrics("").items() if not name.startswith(undefined)}
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["k3"] >= 0
        assert metrics["k3_reverse"] >= 0
        assert metrics["ess"] == pytest.approx(1.0)


def test_a_huge_difference_leaves_the_reverse_divergence_exact() -> None:
    metrics = of_differences([[40.0, 0.0]]).metrics(prefix="")

    assert metrics["k3_reverse"] == pytest.approx((math.exp(-40) - 1 + 40) / 2)


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
    assert [(token.sequence, token.position) for token in stats.worst_tokens()] == [
        (8, 1),
        (8, 0),
        (3, 0),
        (7, 1),
        (7, 0),
    ]
    assert {band.label: band.tokens for band in stats.position_bands()} == {"first": 3, "last": 2}


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
    with pytest.raises(ValueError, match=r"token_ids \(2, 4\)"):
        MismatchStats.from_log_probs(*(torch.zeros(2, 3),) * 3, token_ids=torch.zeros(2, 4))


def test_state_is_small() -> None:
    d = torch.logspace(-10, 4, 20_000, dtype=torch.float64)[None, :]
    d = torch.cat([d, -d])
    stats = MismatchStats.from_log_probs(-d.abs(), d - d.abs(), torch.ones_like(d))

    assert STATE_SIZE * 8 <= 64 * 1024
    assert len(pickle.dumps(stats)) < 64 * 1024
    assert len(pickle.dumps(summary(realistic(shape=(64, 256))))) < 8 * 1024
    assert len(json.dumps(summary(realistic(shape=(64, 256))).to_dict())) < 24 * 1024


def test_gradients_are_not_tracked() -> None:
    sampler, learner, mask = realistic()
    stats = summary((sampler, learner.requires_grad_(), mask))

    assert not stats.vector.requires_grad
    assert stats.d_sum


def test_nothing_waits_for_an_accelerator() -> None:
    """Tensors of the meta device have no values: whatever needs one, to branch on or for a shape, fails there."""
    batch = (torch.empty(6, 9, device="meta"), torch.empty(6, 9, device="meta"), torch.empty(6, 9, device="meta"))
    stats = MismatchStats.from_log_probs(*batch, token_ids=torch.empty(6, 9, device="meta", dtype=torch.int64))

    assert stats.vector.shape == (STATE_SIZE,)
    assert (stats + stats).vector.device.type == "meta"
    assert MismatchStats.merge_all([stats] * 3).vector.device.type == "meta"


@pytest.mark.parametrize("rows", [512, 4096])
def test_what_a_batch_on_an_accelerator_takes_is_a_chunks_not_the_batchs(rows: int) -> None:
    sides = [torch.empty(rows, 4096, device="meta") for _ in range(3)]
    token_ids = torch.empty(rows, 4096, device="meta", dtype=torch.int64)
    with LiveBytes() as live:
        MismatchStats.from_log_probs(*sides, token_ids=token_ids)
    mask = rows * 4096
    assert live.peak - mask < 190 * 2**20


@given(batches().filter(lambda batch: len(batch[0]) > 0))
@settings(deadline=None)
def test_an_accelerator_sees_the_same_tokens(batch: Batch) -> None:
    """What is done on an accelerator, where places are masked instead of left out, done on the host."""
    tally = measure.Tally(torch.device("cpu"))
    tally.add(padded(*batch, token_ids=None, numbers=torch.arange(len(batch[0]))))

    assert_same(summary(batch), MismatchStats(tally.vector()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_summary() -> None:
    batch = realistic()
    stats = MismatchStats.from_log_probs(*(part.cuda() for part in batch))

    assert stats.vector.is_cuda
    assert_same(summary(batch), stats.to_host())
