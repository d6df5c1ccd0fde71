"""Kinds of records, generated: each is read as what it is, and what only looks like it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp16_patch.mismatch.diagnosis.alerts import Alerts
from fp16_patch.mismatch.diagnosis.findings import Diagnosis, diagnose
from fp16_patch.mismatch.diagnosis.judgement import Thresholds, too_large
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.diagnosis.simulated import BF16, FP16, Batch, Policy, causes, text

FP32 = FP16 / 4096

seeds = st.integers(0, 1 << 20)
noises = st.sampled_from([BF16, FP16])
few = settings(deadline=None, max_examples=12)

Change = Callable[[Batch, torch.Generator], Batch]


def run(policy: Policy, seed: int, change: Change | None = None, steps: int = 4, first: int = 1) -> dict[int, Batch]:
    """Some steps' log-probs, each changed so."""
    generator = torch.Generator().manual_seed(seed)
    batches = (policy.batch(800, index, generator) for index in range(steps))
    return {first + index: change(batch, generator) if change else batch for index, batch in enumerate(batches)}


def measured(batches: dict[int, Batch]) -> dict[int, MismatchStats]:
    return {step: MismatchStats.from_log_probs(*batch) for step, batch in batches.items()}


def findings(batches: dict[int, Batch], **more: Any) -> list[Diagnosis]:
    return diagnose(measured(batches), **more)


def chosen(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many sampled tokens inside of their sequences, as a mask."""
    inside = mask & mask.roll(1, 1) & mask.roll(-1, 1)
    inside[:, [0, -1]] = False
    places = inside.flatten().nonzero().squeeze(1)
    picked = places[torch.randperm(len(places), generator=generator)[:count]]
    return torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, picked, True).view(mask.shape)


def apart(sampler: Tensor, learner: Tensor, here: Tensor, by: Tensor | float) -> tuple[Tensor, Tensor]:
    """Move d by this much where it is told, the side that becomes less likely moving."""
    by = torch.as_tensor(by).expand(sampler.shape)
    return sampler - (by.clamp(min=0) * here), learner + (by.clamp(max=0) * here)


def signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


# Few tokens that are far off.


def spiked(count: int, size: float) -> Change:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = batch
        return *apart(sampler, learner, chosen(mask, count, generator), size), mask

    return change


@given(seeds, noises, st.integers(1, 4), st.floats(3.0, 9.0), st.sampled_from([-1, 1]))
@few
def test_few_tokens_far_off_are_counted_and_shown(seed: int, noise: float, count: int, size: float, sign: int) -> None:
    batches = run(Policy(noise), seed, spiked(count, sign * size))
    total = MismatchStats.merge_all(measured(batches).values())
    assume(total.metrics()["mismatch/token_mult_prob_error"] > 1.05)
    found = findings(batches)

    assert causes(found) == ["rare_spikes"]
    evidence = text(found, "rare_spikes")
    assert evidence.startswith(f"{4 * count} of {total.tokens} tokens (")
    assert "mismatch/token_mult_prob_error is" in evidence
    assert evidence.count("p ") >= 3, "the worst are shown with their probabilities"
    assert "Nothing to repair" not in found[0].advice


@given(seeds, noises, st.integers(1, 3), st.floats(0.02, 0.3), st.sampled_from([-1, 1]))
@few
def test_few_tokens_that_no_alert_is_for_are_rounding(
    seed: int, noise: float, count: int, size: float, sign: int
) -> None:
    assert causes(findings(run(Policy(noise), seed, spiked(count, sign * size)))) == ["precision"]


def test_a_shared_token_is_named() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = spiked(6, -5.0)(Policy().batch(3000, 0, generator), generator)
    ids = torch.where((batch[1] - batch[0]).abs() > 1, 77, 5)
    found = diagnose({3: MismatchStats.from_log_probs(*batch, token_ids=ids)})

    assert "6 of the worst 6 are of token id 77" in text(found, "rare_spikes")
    assert "at step 3, sequence " in text(found, "rare_spikes")


def test_a_threshold_that_the_plan_moves_moves_the_diagnosis() -> None:
    batches = run(Policy(), 0, spiked(1, -6.0))
    high = {f"alert_{name}": 0 for name in ("k1", "ess", "chi2", "token_mult_prob_error", "prob_diff")}

    assert causes(findings(batches)) == ["rare_spikes"]
    assert causes(findings(batches, plan=high)) == ["precision"]


def worse(batch: Batch, generator: torch.Generator, size: float) -> Batch:
    sampler, learner, mask = batch
    return *apart(sampler, learner, mask, size * torch.randn(mask.shape, generator=generator)), mask


@given(
    seeds,
    noises,
    st.sampled_from([spiked(1, -5.0), spiked(2, 4.0), spiked(30, -3.0), lambda *of: worse(*of, size=0.3), None]),
    st.sampled_from([{}, {"sampler_temperature": 0.9}, {"behind": (0, 1, 2)}, {"noise": 0.03}]),
)
@few
def test_what_alerts_fire_for_is_never_called_rounding(
    seed: int, noise: float, change: Change | None, settings: dict[str, Any]
) -> None:
    steps = measured(run(replace(Policy(noise), **settings), seed, change))
    alerts = Alerts(Thresholds())
    fired = [alert.name for step, stats in steps.items() for alert in alerts.update(step, stats.metrics())]
    total = too_large(MismatchStats.merge_all(steps.values()).metrics(), Thresholds())

    if fired or total:
        assert "precision" not in causes(diagnose(steps))


# The sampler's NaN.


def without_log_prob(count: int, certain: bool, value: float = math.nan) -> Change:
    """The sampler has this in the place of so many log-probs, of tokens that the learner is certain of, or is not."""

    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = (side.clone() for side in batch)
        sure = torch.rand(mask.shape, generator=generator) < 0.1
        sampler[sure & mask] = learner[sure & mask] = -1e-5
        here = chosen(mask, mask.numel(), generator) & (sure if certain else ~sure & (learner < -0.01))
        places = here.flatten().nonzero().squeeze(1)[:count]
        return sampler.flatten().index_fill(0, places, value).view(mask.shape), learner, mask

    return change


@given(seeds, noises, st.integers(1, 9))
@few
def test_nan_of_certain_tokens_is_an_artefact_that_no_alert_counts(seed: int, noise: float, count: int) -> None:
    batches = run(Policy(noise), seed, without_log_prob(count, certain=True))
    found = findings(batches)
    alerts = Alerts(Thresholds())

    assert causes(found) == ["certain_tokens", "precision"]
    assert f"for {4 * count} of " in text(found, "certain_tokens")
    assert found[0].advice.startswith("Nothing to repair")
    assert not [alert for step, stats in measured(batches).items() for alert in alerts.update(step, stats.metrics())]


@given(seeds, st.integers(0, 5), st.integers(1, 3), st.sampled_from([math.nan, -math.inf, math.inf]))
@few
def test_any_other_token_without_a_log_prob_is_none(seed: int, certain: int, others: int, value: float) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        return without_log_prob(others, False, value)(without_log_prob(certain, True)(batch, generator), generator)

    batches = run(Policy(), seed, change)
    alerts = Alerts(Thresholds())

    assert causes(findings(batches))[0] == "nonfinite_sampler"
    assert [alert.name for alert in alerts.update(1, measured(batches)[1].metrics())] == ["nonfinite"]


@given(seeds)
@few
def test_an_infinite_log_prob_of_a_certain_token_is_no_artefact(seed: int) -> None:
    found = findings(run(Policy(), seed, without_log_prob(2, certain=True, value=-math.inf)))

    assert causes(found) == ["nonfinite_sampler", "precision"]


def test_a_learner_without_log_probs_is_no_artefact() -> None:
    batches = run(Policy(), 0, without_log_prob(2, certain=True))
    swapped = {step: (learner, sampler, mask) for step, (sampler, learner, mask) in batches.items()}

    assert causes(findings(swapped))[0] == "nonfinite_learner"


# One place of the sequence.

PLACES = {
    "first token of a sequence": lambda mask: mask & (mask.cumsum(1) == 1),
    "last token of a sequence": lambda mask: mask & (mask.flip(1).cumsum(1).flip(1) == 1),
    "token after a gap in the mask": lambda mask: mask & ~mask.roll(1, 1) & (mask.cumsum(1) > 1),
    "token before a gap in the mask": lambda mask: mask & ~mask.roll(-1, 1) & (mask.flip(1).cumsum(1).flip(1) > 1),
}


def with_a_tools_turn(batch: Batch) -> Batch:
    """Sequences of 24 tokens, of which a tool gave three in the middle."""
    sampler, learner, mask = batch
    whole = mask[:, :24].all(1)
    mask = mask[whole, :24].clone()
    mask[:, 10:13] = False
    return sampler[whole, :24], learner[whole, :24], mask


@given(
    seeds, st.sampled_from([BF16, FP16, FP32]), st.sampled_from([*PLACES]), st.floats(60, 400), st.sampled_from([1, 0])
)
@few
def test_a_gap_on_one_place_is_named_at_any_size(
    seed: int, noise: float, place: str, factor: float, one_sided: int
) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = with_a_tools_turn(batch)
        size = factor * float((learner - sampler)[mask].abs().mean())
        sign = 1.0 if one_sided else signs(mask.shape, generator)
        return *apart(sampler, learner, PLACES[place](mask), size * sign), mask

    found = findings(run(Policy(noise), seed, change))

    assert found[0].cause == "one_position" or (one_sided and found[0].cause == "mask_shifted")
    assert place in text(found, found[0].cause)
    assert not {"precision", "temperature", "raw_log_probs", "truncated_sampling"} & {*causes(found)}


@given(seeds, noises)
@few
def test_rounding_around_a_tools_turn_is_rounding(seed: int, noise: float) -> None:
    assert causes(findings(run(Policy(noise), seed, lambda batch, _: with_a_tools_turn(batch)))) == ["precision"]


@given(seeds, noises, st.sampled_from([*PLACES]))
@few
def test_a_place_that_is_only_less_sure_is_not_named(seed: int, noise: float, place: str) -> None:
    """There are tokens as unsure elsewhere, few beside those that are all but certain."""

    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = with_a_tools_turn(batch)
        unsure = PLACES[place](mask) | (torch.rand(mask.shape, generator=generator) < 0.02)
        return torch.where(unsure, sampler, -1e-7), torch.where(unsure, learner, -1e-7), mask

    assert causes(findings(run(Policy(noise), seed, change))) == ["precision"]


# The first steps after a start.


def bursts(seed: int, noise: float, sizes: dict[int, float], steps: int = 14, first: int = 20) -> dict[int, Batch]:
    batches = run(Policy(noise), seed, steps=steps, first=first)
    generator = torch.Generator().manual_seed(seed)
    return batches | {step: worse(batches[step], generator, size) for step, size in sizes.items()}


@given(seeds, noises, st.lists(st.floats(0.2, 1.0), min_size=1, max_size=5), st.sampled_from([0, 1, 20, 700]))
@few
def test_a_gap_of_the_first_steps_is_told_apart(seed: int, noise: float, sizes: list[float], first: int) -> None:
    sizes = sorted(sizes, reverse=True)
    found = findings(bursts(seed, noise, dict(enumerate(sizes, first)), first=first))

    assert causes(found) == ["after_start", "precision"]
    last = first + len(sizes) - 1
    listed = f"step {first}" if len(sizes) == 1 else f"steps {first} to {last}"
    assert f" at {listed}, the first after a start" in text(found, "after_start")
    assert f"from step {last + 1} on" in text(found, "after_start")


@given(seeds, noises, st.integers(2, 3))
@few
def test_a_restart_inside_the_record_is_a_start_too(seed: int, noise: float, count: int) -> None:
    batches = bursts(seed, noise, {27 + index: 0.4 for index in range(count)})

    assert causes(findings(batches, starts=[20, 27])) == ["after_start", "precision"]
    # Without a start there, such steps are something else.
    assert "after_start" not in causes(findings(batches))
    assert "precision" not in causes(findings(batches))


@given(seeds, noises)
@few
def test_a_gap_that_stays_or_comes_later_is_no_burst(seed: int, noise: float) -> None:
    for sizes in (dict.fromkeys(range(20, 34), 0.3), dict.fromkeys(range(20, 31), 0.3), {33: 0.4, 32: 0.4}):
        assert "after_start" not in causes(findings(bursts(seed, noise, sizes)))


@given(seeds, noises)
@few
def test_a_policy_that_becomes_certain_has_no_burst(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = run(Policy(noise), seed, steps=10, first=20)
    for step, (sampler, learner, mask) in batches.items():
        certain = torch.rand(mask.shape, generator=generator) < (0.0 if step < 23 else 0.85)
        batches[step] = torch.where(certain, -1e-6, sampler), torch.where(certain, -1e-6, learner), mask

    assert causes(findings(batches)) == ["precision"]


# What is no log-prob.


@given(seeds, st.sampled_from([0, 1]), st.integers(1, 5), st.floats(0.6, 80.0))
@few
def test_log_probs_above_0_leave_nothing_else_to_say(seed: int, side: int, count: int, value: float) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sides = [values.clone() for values in batch[:2]]
        sides[side][chosen(batch[2], count, generator)] = value
        return *sides, batch[2]

    batches = run(Policy(), seed, change)
    found, name = findings(batches), ("sampler", "learner")[side]

    assert causes(found) == ["not_log_probs"]
    assert f"The {name}'s log-prob is above 0 for {4 * count} of " in text(found, "not_log_probs")
    fired = Alerts(Thresholds()).update(1, measured(batches)[1].metrics())
    assert f"positive_{name}" in [alert.name for alert in fired]


@given(seeds, noises, st.floats(1e-9, 2e-3))
@few
def test_rounding_above_0_is_rounding(seed: int, noise: float, above: float) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = batch
        certain = torch.rand(mask.shape, generator=generator) < 0.2
        noise = above * torch.randn(mask.shape, generator=generator)
        return torch.where(certain, noise, sampler), torch.where(certain, -noise.abs(), learner), mask

    assert "not_log_probs" not in causes(findings(run(Policy(noise), seed, change)))


# A coarse record.

GRIDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@given(seeds, st.sampled_from([*GRIDS]), st.sampled_from(["sampler", "learner", "both"]))
@few
def test_a_record_on_a_coarser_grid_is_called_coarse(seed: int, dtype: str, side: str) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sides = dict(zip(("sampler", "learner"), batch[:2], strict=True))
        sides |= {name: values.to(GRIDS[dtype]).float() for name, values in sides.items() if side in (name, "both")}
        return *sides.values(), batch[2]

    found = findings(run(Policy(FP32), seed, change))

    assert causes(found) == ["coarse_record"]
    evidence = text(found, "coarse_record")
    for name in ("sampler", "learner"):
        assert (f"log-probs of the {name} that are not 0 lie on {dtype}'s grid" in evidence) is (side in (name, "both"))
    told = float(evidence.partition("makes mean |d| up to about ")[2].partition(";")[0])
    seen = float(evidence.partition("; it is ")[2].split(". ")[0])
    # Where both sides agree, both are rounded alike.
    assert seen < told if side == "both" else told == pytest.approx(seen, rel=0.35)


@given(seeds, noises)
@few
def test_a_coarse_engine_is_no_coarse_record(seed: int, noise: float) -> None:
    """Its logits are coarse; its log-probs, made of them in float32, are not. One value off the grid says as much."""
    assert causes(findings(run(Policy(noise), seed))) == ["precision"]
    batches = {
        step: (sampler.bfloat16().float(), learner, mask)
        for step, (sampler, learner, mask) in run(Policy(noise), seed).items()
    }
    place = batches[1][2].flatten().nonzero()[0]
    batches[1][0].view(-1)[place] = -1.2345678

    assert "coarse_record" not in causes(findings(batches))


def test_a_larger_gap_than_the_record_makes_is_told_besides() -> None:
    batches = {step: (s.half().float(), learner, mask) for step, (s, learner, mask) in run(Policy(BF16), 0).items()}

    assert causes(findings(batches)) == ["coarse_record", "precision"]


# Adapters.


@given(seeds, st.sampled_from([(0, 1), (0, 1, 2)]))
@few
def test_rounded_adapters_are_the_second_reading_of_a_small_growth(seed: int, behind: tuple[int, ...]) -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        sampler, learner, mask = batch
        return sampler, sampler + 0.2 * (learner - sampler), mask

    small = findings(run(Policy(FP16, behind=behind), seed, change))
    large = findings(run(Policy(FP16, behind=behind), seed))

    assert causes(small) == ["stale_weights", "rounded_adapters"]
    assert "the figures do not tell the two apart" in text(small, "rounded_adapters")
    assert causes(large) == ["stale_weights"]
