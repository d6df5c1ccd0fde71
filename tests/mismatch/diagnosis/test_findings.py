"""The diagnosis names what was planted into a simulated policy, and nothing where nothing was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.mismatch.diagnosis.findings import CAUSES, diagnose, diagnose_run
from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.report.comparison import CAUSES as SPOKEN
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.diagnosis.simulated import BF16, FP16, Batch, Policy, causes, text

NOISES = pytest.mark.parametrize("noise", [BF16, FP16], ids=["bf16", "fp16"])

PLANTED: dict[str, tuple[str, Policy]] = {
    "nothing": ("precision", Policy()),
    "sampler at 0.8": ("temperature", Policy(sampler_temperature=0.8)),
    "sampler at 1.2": ("temperature", Policy(sampler_temperature=1.2)),
    "learner at 0.7": ("temperature", Policy(learner_temperature=0.7)),
    "raw log-probs at 0.7": ("raw_log_probs", Policy(sampler_temperature=0.7, learner_temperature=0.7, reported=1.0)),
    "raw log-probs at 1.3": ("raw_log_probs", Policy(sampler_temperature=1.3, learner_temperature=1.3, reported=1.0)),
    "raw log-probs at 0.3": ("raw_log_probs", Policy(sampler_temperature=0.3, learner_temperature=0.3, reported=1.0)),
    "top-p 0.95": ("truncated_sampling", Policy(top_p=0.95)),
    "top-p 0.8": ("truncated_sampling", Policy(top_p=0.8)),
    "top-k 10": ("truncated_sampling", Policy(top_k=10)),
    "top-k 2, mostly sure": ("truncated_sampling", Policy(top_k=2, peaks=(2.0, 30.0))),
    "greedy": ("truncated_sampling", Policy(top_k=1)),
    "syncs dropped": ("stale_weights", Policy(behind=(0, 1, 2, 3))),
    "sync one step late": ("stale_weights", Policy(behind=(0, 1))),
    "mask past the end": ("mask_shifted", Policy(edge="past the end")),
    "mask before the first": ("mask_shifted", Policy(edge="before the first")),
    "log-probs late": ("mask_shifted", Policy(edge="log-probs late")),
}

MIXED = {
    "actor": {"autocast": ["bfloat16"], "parameter": ["bfloat16"], "activation": ["bfloat16"], "master": ["float32"]},
    "rollout": {"engine_weight": ["float16"], "wire": ["float32"], "activation": ["float16"], "kv_cache": ["float16"]},
}
UNIFORM = {"actor": {"autocast": ["float16"], "activation": ["float16"]}, "rollout": {"engine_weight": ["float16"]}}


def with_nan(batch: Batch, sampler: int = 0, learner: int = 0) -> MismatchStats:
    """The batch with so many rows that have a NaN in their first token, on either side."""
    sides = [side.clone() for side in batch[:2]]
    sides[0][:sampler, 0] = sides[1][:learner, 0] = math.nan
    return MismatchStats.from_log_probs(*sides, batch[2])


@NOISES
@pytest.mark.parametrize("planted", PLANTED)
def test_names_what_was_planted(planted: str, noise: float) -> None:
    cause, policy = PLANTED[planted]
    policy = replace(policy, noise=noise)

    assert [causes(diagnose(policy.run(3000, seed)))[0] for seed in range(3)] == [cause] * 3
    assert causes(diagnose(replace(policy, draws=10).run(100_000, seed=3, steps=2)))[0] == cause


@NOISES
def test_no_false_alarm(noise: float) -> None:
    policy = Policy(noise)

    assert [causes(diagnose(policy.run(1500, seed, steps=3))) for seed in range(100, 130)] == [["precision"]] * 30


@NOISES
@pytest.mark.parametrize(
    "policy",
    [Policy(peaks=(6.0, 20.0)), Policy(peaks=(0.02, 0.2)), Policy(draws=16), Policy(vocabulary=256)],
    ids=["peaked", "flat", "repeated contexts", "more words"],
)
def test_no_false_alarm_with_other_policies(policy: Policy, noise: float) -> None:
    policy = replace(policy, noise=noise)

    assert [causes(diagnose(policy.run(1500, seed, steps=2))) for seed in range(5)] == [["precision"]] * 5


@NOISES
def test_a_policy_that_becomes_less_sure_is_no_stale_one(noise: float) -> None:
    """Tokens that are all but certain have no gap to speak of: where they become fewer, mean |d| grows."""
    generator = torch.Generator().manual_seed(0)
    steps = {}
    for step, share in enumerate((0.8, 0.8, 0.2, 0.0, 0.0), start=1):
        sampler, learner, mask = Policy(noise).batch(3000, 0, generator)
        certain = torch.rand(mask.shape, generator=generator) < share
        sides = (torch.where(certain, -1e-6, side) for side in (sampler, learner))
        steps[step] = MismatchStats.from_log_probs(*sides, mask)

    assert causes(diagnose(steps)) == ["precision"]
    assert steps[5].metrics()["mismatch/mean_abs"] > 3 * steps[1].metrics()["mismatch/mean_abs"]


@NOISES
def test_a_policy_that_becomes_surer_is_no_stale_one(noise: float) -> None:
    """Of a peaked context the rare tokens have more of a gap than they had when it was flat."""
    steps = {}
    for seed, peaks in enumerate([(0.5, 3.0), (1.6, 6.4), (2.7, 9.8), (3.8, 13.2), (4.9, 16.6)]):
        steps |= Policy(noise, peaks=peaks).run(700, seed, steps=1, first=seed + 1)

    assert causes(diagnose(steps)) == ["precision"]


def test_rounding_of_a_flat_distribution_is_no_temperature() -> None:
    """Where log μ varies hardly more than its rounding, d goes with it."""
    assert causes(diagnose(Policy(noise=0.3, peaks=(0.01, 0.02)).run(3000, seed=0))) == ["precision"]


def test_rare_ratios_that_few_samples_miss_are_no_truncation() -> None:
    cold = Policy(sampler_temperature=0.2)
    named = [cause for seed in range(12) for cause in causes(diagnose(cold.run(300, seed, steps=1)))]

    assert "truncated_sampling" not in named
    assert named.count("temperature") > 6


def test_stale_weights_after_exact_agreement() -> None:
    """As with kernels that are the same on both sides."""
    sampler, _, mask = Policy().batch(1000, 0, torch.Generator().manual_seed(0))
    agreed = {1: MismatchStats.from_log_probs(sampler, sampler, mask)}

    assert causes(diagnose(agreed | Policy(behind=(1,)).run(3000, seed=0, first=2))) == ["stale_weights"]


def test_truncation_and_temperature_together() -> None:
    findings = diagnose(Policy(top_p=0.9, sampler_temperature=0.8).run(3000, seed=0))

    assert causes(findings) == ["truncated_sampling", "temperature"]


def test_stale_weights_besides_truncation_hide_neither() -> None:
    findings = diagnose(Policy(FP16, top_p=0.999, behind=(0, 4, 8, 12)).run(3000, seed=0))

    assert "stale_weights" in causes(findings)


@pytest.mark.parametrize(("temperature", "told"), [(0.8, 0.8), (1.25, 1.25), (0.9, 0.9)])
def test_the_ratio_of_the_temperatures_is_told(temperature: float, told: float) -> None:
    evidence = text(diagnose(Policy(FP16, sampler_temperature=temperature).run(20_000, seed=0)), "temperature")

    estimate = float(evidence.partition("T_sampler/T_learner is about ")[2][:4])
    assert estimate == pytest.approx(told, abs=0.05)
    assert "It is there from the first step on" in evidence


def test_few_tokens_leave_temperature_and_raw_log_probs_undecided() -> None:
    findings = diagnose(Policy(FP16, sampler_temperature=0.97).run(600, seed=1, steps=2))

    assert findings[0].cause in ("temperature", "raw_log_probs")
    assert "tokens do not tell it from" in findings[0].evidence[-1]


@pytest.mark.parametrize(
    ("sampler", "setting"),
    [
        ("sglang", "SGLANG_RETURN_ORIGINAL_LOGPROB"),
        ("vllm", "logprobs_mode"),
        (None, "logprobs_mode"),
        (["no", "name"], "logprobs_mode"),
    ],
    ids=str,
)
def test_the_setting_of_raw_log_probs_is_the_samplers(sampler: object, setting: str) -> None:
    steps = Policy(sampler_temperature=0.7, learner_temperature=0.7, reported=1.0).run(3000, seed=0)
    advice = {each.cause: each.advice for each in diagnose(steps, plan={"sampler": sampler})}
    assert setting in advice["raw_log_probs"]


def test_top_p_is_told() -> None:
    evidence = text(diagnose(Policy(FP16, top_p=0.8).run(3000, seed=0)), "truncated_sampling")

    assert "the log of 0.8" in evidence


def test_a_truncation_that_is_small_against_the_rounding_is_named_without_an_estimate() -> None:
    findings = diagnose(Policy(BF16, top_p=0.995).run(3000, seed=0))

    assert causes(findings) == ["truncated_sampling"]
    assert "the log of" not in text(findings, "truncated_sampling")


def test_padding_is_told() -> None:
    evidence = text(diagnose(Policy(edge="before the first").run(3000, seed=0)), "mask_shifted")

    assert "of the first token of a sequence" in evidence
    assert "the sampler's log-prob is -1 in most of the worst tokens" in evidence


def test_an_unsure_first_token_is_no_shifted_mask() -> None:
    """Flat where a sequence begins, and all but certain afterwards: the first token has nearly all of the gap."""
    generator = torch.Generator().manual_seed(0)
    first, rest = Policy(peaks=(1.0, 2.0), sampler_temperature=0.6), Policy(peaks=(60.0, 90.0), sampler_temperature=0.6)
    unsure, certain = (policy.batch(tokens, 0, generator) for policy, tokens in ((first, 1500), (rest, 1500)))
    rows = 60
    sides = [torch.cat([unsure[side][:rows, :1], certain[side][:rows]], 1) for side in range(2)]
    mask = torch.cat([unsure[2][:rows, :1], certain[2][:rows]], 1)
    steps = {step: MismatchStats.from_log_probs(*sides, mask) for step in (1, 2)}

    assert "mask_shifted" not in causes(diagnose(steps))


def test_stale_weights_need_the_first_step() -> None:
    findings = diagnose(Policy(behind=(4,)).run(20_000, seed=0, first=200))

    assert causes(findings) == ["unknown"]
    evidence = text(findings, "unknown")
    assert "Remains: stale weights" in evidence
    assert "steps 200 to 203" in evidence
    assert "Ruled out: unequal temperatures" in evidence


def test_a_large_gap_from_the_first_step_on_is_not_missed_updates() -> None:
    findings = diagnose(Policy(behind=(4,)).run(3000, seed=0))

    assert causes(findings) == ["unknown"]
    assert "missed updates (by step 4 it is 1.0 times the first step's)" in text(findings, "unknown")
    assert "weights that differ from the start" in text(findings, "unknown")


def test_slow_growth_is_rounding() -> None:
    steps = {}
    for step in range(1, 301, 10):
        steps |= Policy(BF16 / 8 * (1 + step / 50)).run(400, seed=step, steps=1, first=step)
    findings = diagnose(steps)

    assert causes(findings) == ["precision"]
    assert "Over the whole run it has grown" in text(findings, "precision")


@pytest.mark.parametrize(
    ("noise", "learner", "sampler"), [(BF16, "bfloat16", "float16"), (BF16, "float16", "bfloat16")]
)
def test_one_coarser_side_is_named_with_both_dtypes(noise: float, learner: str, sampler: str) -> None:
    ledger = {"actor": {"autocast": [learner], "master": ["float32"]}, "rollout": {"engine_weight": [sampler]}}
    findings = diagnose(Policy(noise).run(3000, seed=0), ledger)

    assert causes(findings) == ["one_side_lower_precision"]
    coarser = "learner" if learner == "bfloat16" else "sampler"
    assert f"The {coarser} is the coarser side" in text(findings, "one_side_lower_precision")
    assert "bfloat16" in text(findings, "one_side_lower_precision")
    assert "float16" in text(findings, "one_side_lower_precision").replace("bfloat16", "")


def test_weights_rounded_in_transit_are_a_coarser_sampler() -> None:
    ledger = {"actor": {"autocast": ["float16"]}, "rollout": {"engine_weight": ["float16"], "wire": ["bfloat16"]}}

    assert "rollout wire in bfloat16" in text(diagnose(Policy().run(3000, 0), ledger), "one_side_lower_precision")


def test_a_fault_comes_before_the_dtypes() -> None:
    findings = diagnose(Policy(sampler_temperature=0.8).run(3000, seed=0), MIXED)

    assert causes(findings) == ["temperature", "one_side_lower_precision"]


def test_a_gap_that_mixed_dtypes_do_not_explain_is_also_unknown() -> None:
    findings = diagnose(Policy(behind=(4,)).run(3000, seed=0, first=200), MIXED)

    assert causes(findings) == ["one_side_lower_precision", "unknown"]


def test_more_than_float16_explains_is_unknown() -> None:
    findings = diagnose(Policy(BF16).run(3000, seed=0), UNIFORM)

    assert causes(findings) == ["unknown"]
    assert "computes more coarsely than is on record" in text(findings, "unknown")
    assert causes(diagnose(Policy(BF16).run(3000, seed=0), plan={"dtype": "float16"})) == ["unknown"]
    assert causes(diagnose(Policy(FP16).run(3000, seed=0), UNIFORM)) == ["precision"]


def test_precision_says_what_it_rests_on() -> None:
    floor = Policy(FP16 / 4).run(1000, seed=5, steps=1)[1]
    evidence = text(diagnose(Policy(FP16).run(3000, seed=0), UNIFORM, noise_floor=floor), "precision")

    for part in (
        "float16 is the coarsest dtype",
        "Both tails are alike",
        "Mean r is ",
        "slope of log π on log μ 1.000",
        "by step 4",
    ):
        assert part in evidence
    assert float(evidence.partition("It is ")[2].partition(" times the learner's gap")[0]) == pytest.approx(4, rel=0.3)


def test_without_a_ledger_one_side_cannot_be_told() -> None:
    assert "Without a ledger" in text(diagnose(Policy().run(3000, seed=0)), "precision")


@pytest.mark.parametrize(
    ("sampler", "learner", "named"), [(9, 0, ["nonfinite_sampler"]), (0, 9, ["nonfinite_learner"])]
)
def test_nan_is_named_by_its_side(sampler: int, learner: int, named: list[str]) -> None:
    batch = Policy().batch(3000, 0, torch.Generator().manual_seed(0))
    findings = diagnose({1: with_nan(batch, sampler, learner)})

    assert causes(findings) == [*named, "precision"]
    assert f"for 9 of {int(batch[2].sum())} tokens" in findings[0].evidence[0]
    assert findings[0].evidence[0].endswith("for 0.")


def test_nan_on_both_sides_beside_another_fault() -> None:
    batch = Policy(top_p=0.8).batch(3000, 0, torch.Generator().manual_seed(0))

    assert causes(diagnose({1: with_nan(batch, 3, 5)})) == [
        "nonfinite_sampler",
        "nonfinite_learner",
        "truncated_sampling",
    ]


def test_too_few_tokens_are_unknown() -> None:
    findings = diagnose(Policy(sampler_temperature=0.5).run(80, seed=0, steps=1))

    assert causes(findings) == ["unknown"]
    assert "are too few to say; it takes 100" in text(findings, "unknown")
    assert causes(diagnose({})) == ["unknown"]
    assert text(diagnose({}), "unknown").startswith("0 tokens")


def test_equal_sides_are_precision() -> None:
    sampler, _, mask = Policy().batch(1000, 0, torch.Generator().manual_seed(0))
    findings = diagnose({1: MismatchStats.from_log_probs(sampler, sampler, mask)})

    assert causes(findings) == ["precision"]
    assert "agree exactly" in text(findings, "precision")


def test_old_states_have_a_diagnosis() -> None:
    """Version 1 has neither mean r nor bands: what can be said is said of the size."""
    state = Policy().run(3000, seed=0, steps=1)[1].to_dict()
    kept = ("tokens", "sequences", "d_sum", "d_abs_sum", "d_square_sum", "d_min", "d_max", "k3_sum", "histogram")
    old = MismatchStats.from_dict({"version": 1, **{name: state[name] for name in kept}})
    findings = diagnose({1: old, 2: old})

    assert causes(findings) == ["precision"]
    assert "nan" not in " ".join(findings[0].evidence)


@pytest.mark.parametrize(
    ("planted", "settings"),
    [
        ("sampler at 0.8", ("actor_rollout_ref.rollout.temperature", "--rollout.temperature")),
        ("raw log-probs at 0.7", ("actor_rollout_ref.rollout.logprobs_mode",)),
        ("top-p 0.8", ("actor_rollout_ref.rollout.top_p", "--rollout.top_p")),
        ("sync one step late", ("sync",)),
        ("mask past the end", ("response mask",)),
    ],
)
def test_advice_names_the_setting(planted: str, settings: tuple[str, ...]) -> None:
    finding = diagnose(PLANTED[planted][1].run(3000, seed=0))[0]

    assert all(setting in finding.advice for setting in settings)


@pytest.mark.parametrize(
    ("noise", "dtype", "advice"),
    [
        (BF16, "bfloat16", "Nothing to repair, but float16 on both sides (FP16_PATCH=1) makes the gap about 8 times"),
        (FP16, "float16", "Nothing to repair: the gap is as small as float16 makes it. Batch-invariant kernels"),
        (FP16 / 64, "float32", "Nothing to repair."),
        (FP16, None, "Nothing to repair. If a side computes in bfloat16, float16 on both sides"),
    ],
)
def test_advice_on_rounding_is_by_the_dtype_of_the_run(noise: float, dtype: str | None, advice: str) -> None:
    (finding,) = diagnose(Policy(noise).run(3000, seed=0), plan={"dtype": dtype})

    assert finding.cause == "precision"
    assert finding.advice.startswith(advice)
    assert ("FP16_PATCH" in finding.advice) is (dtype not in ("float16", "float32"))


def test_each_finding_has_a_name_that_people_read() -> None:
    assert SPOKEN.keys() == {*CAUSES}


def test_the_diagnosis_of_a_record() -> None:
    steps = Policy(FP16, top_p=0.9).run(3000, seed=0)
    record = run_record(steps, UNIFORM)

    assert diagnose_run(record) == diagnose(steps, UNIFORM)
    assert causes(diagnose_run(record)) == ["truncated_sampling"]
    assert set(causes(diagnose_run(run_record({}, {})))) <= set(CAUSES)


def run_record(steps: Mapping[int, MismatchStats], ledger: dict[str, dict[str, list[str]]]) -> RunRecord:
    return RunRecord(
        path=Path(),
        ledger=ledger,
        processes=1,
        stats=MismatchStats.merge_all(steps.values()),
        step_stats=dict(steps),
    )
