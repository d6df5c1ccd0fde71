"""verl's FSDP learner with and without a plan: each defect is seen on stock verl first, then gone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import verl_environment
from tests.installed_release import ORACLE, needs, sits_in
from tests.ranks import RANKS
from tests.verl.conftest import UNDER_A_PLAN, Facts
from tests.verl.fsdp.skips import assert_each_rank_tells_of_the_skip

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")

STRATEGIES = ("fsdp", "fsdp2")
# As in `learner.py`.
TOO_HIGH, FITTING = 2.0**21, 128.0


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_stock_ignores_the_documented_dtype_key(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["compute_dtypes"]
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(facts, ["bfloat16"])


def test_actor_critic_and_ref_compute_in_float16(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["compute_dtypes"]
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(
        ("actor", "critic", "ref"), ["float16"]
    )


def test_only_engines_that_train_have_a_scaler(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["compute_dtypes"]
    assert {role: fact["scaler"] for role, fact in facts.items()} == {"actor": True, "critic": True, "ref": False}


def test_stock_rounds_the_rope_frequencies_of_a_reference_stored_in_half(
    learner: Callable[..., Facts], strategy: str
) -> None:
    facts = learner("stock", strategy, 2)["rope"]
    assert facts["dtypes"] == ["bfloat16"]
    assert facts["apart"] > 1e-4


def test_rope_frequencies_stay_in_float32(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    assert learner("plan", strategy, ranks)["rope"] == {"dtypes": ["float32"], "apart": 0.0}


def test_the_same_step_is_taken_in_every_release(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("plan", strategy, 2)["oracle"]
    assert (facts["grad_norm"], facts["moved"]) == pytest.approx(ORACLE["actor"], rel=1e-4)


def test_stock_scaler_is_off_away_from_cuda_and_steps_on_nan(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["overflow_on_one_rank"]
    assert not facts["scaler_enabled"]
    assert facts["nan_parameters"] > 0


def test_an_overflow_on_one_rank_changes_no_parameter(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["overflow_on_one_rank"]
    assert facts["scaler_enabled"]
    assert facts["unchanged_on_every_rank"]
    assert facts["nan_parameters"] == 0
    assert facts["moved_by_a_clean_step"]


def test_stock_advances_the_schedule_on_a_skip_and_says_nothing(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock-with-scaler", strategy, 2)["overflow_on_one_rank"]
    assert facts["unchanged_on_every_rank"]  # it did skip
    before, after, _ = facts["lr"]
    assert after > before
    assert not [name for name in facts["overflow_metrics"] if name.startswith("fp16/")]


def test_the_schedule_holds_on_a_skip_and_goes_on_after_it(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    before, after, last = learner("plan", strategy, ranks)["overflow_on_one_rank"]["lr"]
    assert before == after < last


def test_a_skip_is_in_the_metrics_of_every_rank(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["overflow_on_one_rank"]
    assert_each_rank_tells_of_the_skip(facts)


def test_an_update_tried_again_is_bit_for_bit_the_one_from_the_scale_it_ends_at(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("retry", strategy, ranks)["retried"]
    assert facts["dropout_matters"]
    # Three updates of two micro-batches, the first of them with five halvings.
    assert (facts["found"]["computed"], facts["clean"]["computed"]) == (16, 6)
    assert facts["found"]["scales"] == [TOO_HIGH / 2**5] * 3
    assert facts["same"] == dict.fromkeys(("state", "random", "losses", "norms", "lr"), True)


def test_a_retry_is_in_the_metrics_and_is_no_skip(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    first, second, _ = learner("retry", strategy, ranks)["retried"]["found"]["metrics"]

    def seen(metrics: Facts) -> list[set[float]]:
        names = ("retries/max", "retries_total/max", "step_skipped", "skipped_total/max")
        return [{value for [value] in metrics[f"fp16/{name}"]} for name in names]

    assert seen(first) == [{5.0}, {5.0}, {0.0}, {0.0}]
    assert seen(second) == [{0.0}, {5.0}, {0.0}, {0.0}]


@pytest.mark.parametrize(("arm", "taken"), [("plan", 3), ("retry", 6)])
def test_no_mini_batch_is_lost_to_one_steep_one(
    learner: Callable[..., Facts], strategy: str, ranks: int, arm: str, taken: int
) -> None:
    facts = learner(arm, strategy, ranks)["lost"]
    assert facts["taken"] == taken
    assert facts["metrics"][-1]["fp16/skipped_total/max"] == [[6.0 - taken]] * ranks


def test_an_infinite_loss_is_skipped_and_not_tried_again(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("retry", strategy, ranks)["infinite_loss"]
    assert facts["halved"] == 2.0
    # The second pass over its two micro-batches looks for the module.
    assert facts["computed"] == 4
    assert facts["metrics"]["fp16/step_skipped"] == [[1.0]] * ranks


def test_an_update_that_overflows_at_every_scale_on_one_rank_is_skipped_on_all_and_costs_one_halving(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    assert learner("retry", strategy, ranks)["alone"] == {"unchanged_on_every_rank": True, "scale": 32768.0}


def test_the_log_names_the_module_and_the_rank_where_an_overflow_began(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    log = (learner("retry", strategy, ranks)["out"] / "log.txt").read_text()
    assert f"actor: the overflow at loss scale 65536 began in rank {ranks - 1}: lm_head (gradient of the output)" in log
    assert "is tried again with the same mini-batch at 32768" in log


def test_a_measured_first_scale_leaves_nothing_to_look_for(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    measured = learner("measured", strategy, ranks)["first_scale"]["too_high"]
    assert measured["scales"] == [FITTING] * 3
    last = measured["metrics"][-1]
    assert (last["fp16/retries_total/max"], last["fp16/skipped_total/max"]) == ([[0.0]] * ranks, [[0.0]] * ranks)
    # Where it starts at 65536 or above, the same gradients cost a mini-batch or are tried again.
    unmeasured = learner("retry", strategy, ranks)["first_scale"]["too_high"]["metrics"][-1]
    assert unmeasured["fp16/retries_total/max"] > [[0.0]] * ranks


def test_measuring_the_first_scale_leaves_no_trace(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    measured = learner("measured", strategy, ranks)["first_scale"]["too_high"]
    fixed = learner("retry", strategy, ranks)["first_scale"]["fitting"]
    assert measured["computed"] > fixed["computed"] == 6
    names = ("state", "random", "losses", "norms", "scales", "lr")
    assert {name: measured[name] for name in names} == {name: fixed[name] for name in names}
    log = (learner("measured", strategy, ranks)["out"] / "log.txt").read_text()
    assert f"with room for one 8 times as large, the loss scale starts at {FITTING:g}" in log


def test_the_step_reads_gradients_twice_and_verls_own_five_times(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("retry", strategy, ranks)["kernels"]
    # Where the configuration names another kernel verl takes its own step: unscale, norm, clip, two of torch's Adam.
    assert (facts["default"]["passes"], facts["foreach"]["passes"]) == ([2.0, 2.0], [5.0, 5.0])


def test_the_step_in_two_passes_is_the_same(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("retry", strategy, ranks)["kernels"]
    assert facts["default"]["norms"][0] == facts["foreach"]["norms"][0]
    # Kernels round differently; a step moves a parameter by up to 2.5e-4 here.
    assert facts["apart"] < 1e-7


def test_finite_gradients_of_an_infinite_norm_are_a_skipped_step_on_any_kernel(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    for facts in learner("retry", strategy, ranks)["kernels"]["infinite_norm"].values():
        assert facts == {"norm": "inf", "unchanged_on_every_rank": True, "halved": 2.0}


def test_stock_fails_on_the_fused_kernel(learner: Callable[..., Facts], strategy: str) -> None:
    error = learner("stock-with-scaler", strategy, 2)["fused_chosen"]["error"]
    assert error and "doesn't match the broadcast shape" in error


def test_the_fused_kernel_can_be_chosen(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    assert learner("plan", strategy, ranks)["fused_chosen"] == {"error": None}


def test_torchs_rule_grows_into_an_overflow_and_looking_ahead_does_not(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    blind, ahead = (learner(arm, strategy, ranks)["grown"] for arm in ("torchs-rule", "ahead"))
    bearable = blind["bearable"]
    assert ahead["bearable"] == bearable

    def retries(facts: Facts) -> float:
        return sum(max(retried) for retried in facts["retries"])

    assert retries(blind) > 0
    assert max(max(scales) for scales in blind["scale"]) == 2 * bearable
    assert retries(ahead) == 0
    # Gradients twice as large still fit at the scale it stays at.
    assert {max(scales) for scales in ahead["scale"]} == {bearable / 8, bearable / 4, bearable / 2}
    assert ahead["scale"][-1] == [bearable / 2] * ranks


def test_all_ranks_grow_and_hold_back_together(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    for arm in ("torchs-rule", "ahead"):
        facts = learner(arm, strategy, ranks)["grown"]
        assert facts["on_every_rank"]
        assert facts["growth"] == facts["growth"][:1] * ranks


def test_gradients_are_looked_at_as_often_as_told_and_before_growth(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    def looked(arm: str) -> list[bool]:
        return [bool(headroom) for headroom in learner(arm, strategy, ranks)["grown"]["headroom"]]

    # Another update went before.
    assert looked("torchs-rule") == [(number + 1) % 3 == 0 for number in range(20)]
    ahead = learner("ahead", strategy, ranks)["grown"]
    assert sum(looked("ahead")) > sum(looked("torchs-rule"))
    last = next(headroom for headroom in reversed(ahead["headroom"]) if headroom)
    assert last == last[:1] * ranks
    assert 2.0 <= last[0] < 4.0


def test_underflow_and_headroom_are_those_of_the_gradients(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("torchs-rule", strategy, ranks)["underflow"]
    counted = facts["counted"]

    def share(*groups: str) -> float:
        below, elements = (sum(counted[group][name] for group in groups) for name in ("below", "elements"))
        return below / elements

    # Four layers.
    layers = {"early_layers": ("layer 0", "layer 1"), "middle_layers": ("layer 2",), "late_layers": ("layer 3",)}
    for group, parts in {**layers, "embedding": ("embedding",), "head": ("head",)}.items():
        seen = facts["first"][f"fp16/underflow/{group}"]
        assert seen == seen[:1] * ranks
        assert seen[0] == pytest.approx(share(*parts), abs=0.02), group
        assert facts["first"][f"fp16/zeros/{group}"] <= seen
    assert share(*layers["early_layers"]) > 0.05
    assert facts["first"]["fp16/gradient_headroom/min"] == [65504 / counted["largest"]] * ranks
    assert not [name for name in facts["second"] if "underflow" in name or "headroom" in name]


def test_stock_averages_the_norm_of_a_skipped_step(learner: Callable[..., Facts], strategy: str) -> None:
    norm = learner("stock-with-scaler", strategy, 2)["averaged_norm"]["grad_norm"]
    assert norm != norm or norm == float("inf")


def test_the_norm_of_a_skipped_step_is_averaged_into_nothing(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    metrics = learner("plan", strategy, ranks)["averaged_norm"]
    assert 0 < metrics["grad_norm"] < 1e3
    assert metrics["fp16/step_skipped"] == 0.5
    assert metrics["fp16/skipped_total/max"] == 1.0


def test_stock_resumes_at_the_initial_scale(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock-with-scaler", strategy, 2)["resume"]
    assert facts["saved"]["scale"] == 32768.0
    assert facts["resumed"]["scale"] == 65536.0


def test_a_resumed_run_goes_on_with_scale_and_growth_counter(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)["resume"]
    assert facts["saved"] == facts["resumed"] == {"scale": 32768.0, "growth": 2}
    assert facts["next"] == {"scale": 32768.0, "growth": 3}


def test_a_checkpoint_without_scaler_state_resumes_with_one_warning(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)
    assert facts["resume_from_stock"]["scale"] == 65536.0
    # And one for each time that what every rank had was damaged.
    damaged = {1: 3, 2: 1}[ranks]
    assert (facts["out"] / "log.txt").read_text().count("no loss-scaler state in") == 1 + damaged


def test_ranks_go_on_at_one_scale_whichever_of_their_files_are_damaged(
    learner: Callable[..., Facts], strategy: str
) -> None:
    facts = learner("plan", strategy, 2)
    assert facts["resume_from_stock"]["damaged"] == {"first": [32768.0] * 2, "last": [32768.0] * 2, "all": [4096.0] * 2}
    warnings = [
        line for line in (facts["out"] / "log.txt").read_text().splitlines() if "rank that could read one" in line
    ]
    assert [("rank_0.json: it holds a list" in line, "rank_1.json: it is not JSON" in line) for line in warnings] == [
        (True, False),
        (False, True),
    ]


def test_stock_lets_the_scale_fall_to_zero_in_silence(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock-with-scaler", strategy, 2)["endless_overflow"]
    assert facts["error"] is None
    assert facts["scale"] == 0.0


def test_endless_overflow_stops_and_names_rank_step_and_parameter(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)["endless_overflow"]
    assert facts["error"] == "LossScaleCollapse"
    assert f"optimizer step {facts['attempt'] + 1}:" in facts["message"]
    assert "setting min_scale=1" in facts["message"]
    assert f"rank {ranks - 1}: model." in facts["message"]


@sits_in("fsdp-wire", "FSDPEngine.get_per_tensor_param")
def test_stock_rounds_every_weight_through_bfloat16(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["wire"]
    assert facts["dtypes"] == ["bfloat16"]
    assert not facts["exact"]


def test_no_bfloat16_is_on_the_wire(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["wire"]
    assert facts["dtypes"] == ["float32"]
    assert facts["exact"]


@sits_in("fsdp-wire", "FSDPEngine._merged_lora_per_tensor_param")  # where it is, what is not merged goes out in FP32
def test_stock_sends_twice_the_bytes_whatever_the_driver_says(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["wire_after_clearance"]["nothing"]
    sent = learner("plan", strategy, 2)["wire_after_clearance"]["nothing"]["after"]
    assert {sync["bytes"] for sync in (*facts["before"], *facts["after"])} == {2 * sync["bytes"] for sync in sent}


def test_weights_are_sent_in_the_samplers_dtype_once_it_is_known(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)["wire_after_clearance"]
    for name in ("nothing", "merged"):
        before, after = facts[name]["before"], facts[name]["after"]
        assert [dtypes_of(sync) for sync in before] == [{"float32"}] * 2
        assert [dtypes_of(sync) for sync in after] == [{"float16"}] * 2
        assert [before[0]["bytes"] / sync["bytes"] for sync in after] == [2.0] * 2
        # To the last bit what the sampler would have made of the FP32 ones.
        assert len({sync["rounded"] for sync in (*before, *after)}) == 1


def test_shards_are_rounded_before_they_are_gathered(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("plan", strategy, 2)["wire_after_clearance"]
    assert [sync["gathered"] for sync in facts["nothing"]["before"]] == [["float32"]] * 2
    assert [sync["gathered"] for sync in facts["nothing"]["after"]] == [["float16"]] * 2


@sits_in("fsdp-wire", "FSDPEngine._merged_lora_per_tensor_param")
def test_so_are_those_that_adapters_are_merged_into(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("plan", strategy, 2)["wire_after_clearance"]["merged"]
    assert [sync["gathered"] for sync in facts["after"]] == [["float16"]] * 2


def test_what_the_sampler_keeps_stays_as_it_is(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    for sync in learner("plan", strategy, ranks)["wire_after_clearance"]["some"]["after"]:
        as_it_is = {name for name, dtype in sync["dtypes"].items() if dtype == "float32"}
        assert as_it_is == {name for name in sync["dtypes"] if name.endswith("input_layernorm.weight")} != set()
        assert dtypes_of(sync) == {"float16", "float32"}


def test_nothing_is_rounded_for_a_sampler_whose_weights_are_not_all_known(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)
    assert [dtypes_of(sync) for sync in facts["wire_after_clearance"]["unknown"]["after"]] == [{"float32"}] * 2
    assert (facts["out"] / "log.txt").read_text().count("in FP32: it keeps mixer.A in another dtype") == 1


def dtypes_of(sync: Facts) -> set[str]:
    return set(sync["dtypes"].values())


def test_stock_rounds_merged_lora_through_bfloat16(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["merged_lora_wire"]
    assert facts["dtypes"] == ["bfloat16"]
    assert facts["largest_relative_error"] > 2**-9


def test_merged_lora_is_sent_as_it_is(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["merged_lora_wire"]
    assert facts["dtypes"] == ["float32"]
    # 0.8.0 takes the adapters out again before it reads the weights of FSDP2.
    assert facts["largest_relative_error"] < 1e-5 < 1e-3 < facts["adapted"]


def test_stock_divides_by_the_temperature_in_float16(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["temperature"]
    assert facts["0.7"]["logits"] == ["float16"]
    assert facts["0.7"]["largest_error"] > 1e-5
    assert not facts["0.0"]["finite"]


def test_log_probs_are_those_of_float32_arithmetic(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["temperature"]
    assert facts["0.7"]["logits"] == ["float16"]
    assert facts["0.7"]["largest_error"] < 1e-5
    assert facts["0.0"]["finite"]


@needs("fsdp-gradient-sync")
def test_stock_accumulates_in_float16_under_no_sync(learner: Callable[..., Facts]) -> None:
    assert learner("stock", "fsdp", 2)["accumulation"]["dtypes"] == ["float16"]


def test_micro_batches_add_up_in_float32(learner: Callable[..., Facts], ranks: int) -> None:
    assert learner("plan", "fsdp", ranks)["accumulation"]["dtypes"] == ["float32"]


def test_stock_exports_float32_labelled_bfloat16(learner: Callable[..., Facts]) -> None:
    assert learner("stock-with-scaler", "fsdp2", 2)["exports"] == {"label": "bfloat16", "held": ["float32"]}


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        pytest.param("fsdp", 1, marks=pytest.mark.matrix),
        pytest.param("fsdp2", 1, marks=pytest.mark.matrix),
        ("fsdp2", 2),
    ],
)
def test_exports_are_float16_and_say_so(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    assert learner("plan", strategy, ranks)["exports"] == {"label": "float16", "held": ["float16"]}


@pytest.mark.parametrize(("env", "dtype"), [({}, "bfloat16"), (UNDER_A_PLAN, "float16")], ids=["stock", "plan"])
def test_merged_checkpoints_hold_what_their_label_says(
    learner: Callable[..., Facts], warm_python: Path, tmp_path: Path, env: dict[str, str], dtype: str
) -> None:
    from tests.verl.folder import folder_facts

    shards = learner("plan", "fsdp2", 2)["resume"]["path"]
    merge = [warm_python, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", shards]
    subprocess.run([*merge, "--target_dir", str(tmp_path)], env=verl_environment(env), check=True, timeout=300)
    assert folder_facts(tmp_path) == {"label": dtype, "held": [dtype]}
