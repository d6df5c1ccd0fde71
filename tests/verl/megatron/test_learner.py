"""verl's Megatron learner, real Megatron, on two ranks: each defect is seen on stock verl first, then gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.megatron, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("megatron.core")

from fp16_patch.plan.plan import Plan
from tests.ranks import Facts
from tests.verl.megatron.conftest import LAYOUTS

Arm = Callable[[str], Facts]
RANKS = ("0", "1")
# As in `learner.py`.
TOO_HIGH, LOW = 2.0**21, 2.0**5


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """How two ranks share the work: data, tensor, pipeline or expert parallel, the last of a mixture of experts."""
    return str(request.param)


def values(metrics: Facts, name: str) -> set[float]:
    """Of a metric, from each rank that has one."""
    return {value for [value] in metrics[name]}


def test_parameters_are_float16_and_gradients_add_up_in_float32(megatron_learner: Arm, layout: str) -> None:
    facts = megatron_learner("skip")[layout]["built"]
    assert (facts["parameters"], facts["main_grads"]) == (["float16"], ["float32"])


def test_log_probs_are_those_of_transformers(megatron_learner: Arm, layout: str) -> None:
    # Tensor-parallel ranks add up in another order, and experts in another one than transformers.
    bound = {"dp": 1e-6, "pp": 1e-6, "tp": 5e-3, "ep": 5e-3}[layout]
    assert megatron_learner("skip")[layout]["built"]["log_prob_error"] < bound


@pytest.mark.parametrize("layout", ["vpp", "cp"])
def test_stages_in_turns_and_parts_of_a_sequence_compute_the_same(megatron_learner: Arm, layout: str) -> None:
    assert megatron_learner("skip")[layout]["built"]["log_prob_error"] < 1e-6


@pytest.mark.parametrize("rank", RANKS)
def test_an_overflow_of_one_rank_changes_no_stage_of_any_turn(megatron_learner: Arm, rank: str) -> None:
    facts = megatron_learner("skip")["vpp"]["skipped"][rank]
    assert facts["errors"] == [None, None]
    assert facts["unchanged_on_every_rank"]
    assert facts["moved_by_a_clean_step"]


@pytest.mark.parametrize("rank", RANKS)
def test_stock_ends_at_an_overflow_of_one_rank(megatron_learner: Arm, layout: str, rank: str) -> None:
    facts = megatron_learner("stock")[layout]["overflow_on_one_rank"][rank]
    assert [error.partition(":")[0] for error in facts["errors"]] == ["NotImplementedError"] * 2
    # And would meet the same overflow again.
    assert facts["scales"] == [32768.0]


@pytest.mark.parametrize("rank", RANKS)
def test_an_overflow_of_one_rank_changes_no_parameter(megatron_learner: Arm, layout: str, rank: str) -> None:
    facts = megatron_learner("skip")[layout]["overflow_on_one_rank"][rank]
    assert facts["errors"] == [None, None]
    assert facts["unchanged_on_every_rank"]
    assert facts["moved_by_a_clean_step"]


@pytest.mark.parametrize("rank", RANKS)
def test_all_ranks_and_parts_go_on_at_one_scale(megatron_learner: Arm, layout: str, rank: str) -> None:
    assert megatron_learner("skip")[layout]["overflow_on_one_rank"][rank]["scales"] == [32768.0]


@pytest.mark.parametrize("rank", RANKS)
def test_the_schedule_holds_on_a_skip_and_goes_on_after_it(megatron_learner: Arm, layout: str, rank: str) -> None:
    before, after, last = megatron_learner("skip")[layout]["overflow_on_one_rank"][rank]["lr"]
    assert before == after < last


@pytest.mark.parametrize("rank", RANKS)
def test_a_skip_is_in_the_metrics_and_its_norm_is_not(megatron_learner: Arm, layout: str, rank: str) -> None:
    clean, overflow, last = megatron_learner("skip")[layout]["overflow_on_one_rank"][rank]["metrics"]

    def seen(metrics: Facts) -> list[set[float]]:
        names = ("loss_scale/min", "step_skipped", "skipped_total/max", "consecutive_skips/max")
        return [values(metrics, f"fp16/{name}") for name in names]

    assert seen(clean) == [{65536.0}, {0.0}, {0.0}, {0.0}]
    assert seen(overflow) == [{32768.0}, {1.0}, {1.0}, {1.0}]
    assert seen(last) == [{32768.0}, {0.0}, {1.0}, {0.0}]
    assert ["grad_norm" in metrics for metrics in (clean, overflow, last)] == [True, False, True]


@pytest.mark.parametrize("of", ["too_high", "rank 0", "rank 1"])
def test_an_update_tried_again_is_bit_for_bit_the_one_from_the_scale_it_ends_at(
    megatron_learner: Arm, layout: str, of: str
) -> None:
    """From a scale that no rank bears, and with a gradient that only one rank cannot hold."""
    facts = megatron_learner("retry")[layout]["retried"]
    found, clean = facts[of]["found"], facts[of]["clean"]
    assert facts["dropout_matters"]
    assert found["computed"] > clean["computed"] == 6  # three updates of two micro-batches
    assert facts[of]["same"] == dict.fromkeys(("state", "random", "losses", "norms", "lr"), True)


def test_a_retry_is_in_the_metrics_and_is_no_skip(megatron_learner: Arm, layout: str) -> None:
    facts = megatron_learner("retry")[layout]["retried"]
    for of, start in (("too_high", TOO_HIGH), ("rank 0", 1024.0), ("rank 1", 1024.0)):
        first, second, _ = facts[of]["found"]["metrics"]
        scale = facts[of]["found"]["scales"][0]
        [retries] = values(first, "fp16/retries/max")
        assert scale == start / 2**retries < start
        assert values(second, "fp16/retries/max") == {0.0}
        assert values(second, "fp16/retries_total/max") == {retries}
        assert values(second, "fp16/skipped_total/max") == {0.0}


def test_an_infinite_loss_is_not_tried_at_lower_scales(megatron_learner: Arm) -> None:
    facts = megatron_learner("retry")["pp"]["infinite_loss"]
    # The two micro-batches once more, to see where it begins.
    assert facts["computed"] == 4
    assert values(facts["metrics"], "fp16/retries/max") == {0.0}
    assert values(facts["metrics"], "fp16/step_skipped") == {1.0}


def test_the_module_that_overflowed_first_is_named_with_its_rank(megatron_learner: Arm) -> None:
    log = megatron_learner("retry")["log"]
    assert "began in rank 0: decoder.layers." in log or "began in rank 1: decoder.layers." in log


def test_endless_overflow_stops_all_ranks_and_names_rank_step_and_parameter(megatron_learner: Arm) -> None:
    facts = megatron_learner("skip")["pp"]["endless_overflow"]
    for error in facts["errors"]:
        assert error.startswith("LossScaleCollapse")
        assert f"optimizer step {facts['attempt'] + 1}:" in error
        assert "rank 1: output_layer.weight" in error
    assert facts["parameters_finite"]


@pytest.mark.parametrize("layout", ["pp", "ep"])
def test_the_first_scale_is_measured_over_all_ranks(megatron_learner: Arm, layout: str) -> None:
    facts = megatron_learner("measured")[layout]["first_scale"]
    for metrics in facts["metrics"]:
        assert values(metrics, "fp16/retries_total/max") == values(metrics, "fp16/skipped_total/max") == {0.0}
    # These gradients overflow at 65536, and eight times larger ones would fit at the scale that was found.
    assert set(facts["scales"]) == values(facts["metrics"][0], "fp16/loss_scale/min")
    assert max(facts["scales"]) < 65536
    [headroom] = values(facts["metrics"][0], "fp16/gradient_headroom/min")
    assert 8 <= headroom < 16


@pytest.mark.parametrize("layout", ["pp", "ep"])
def test_underflow_is_told_by_the_layers_place_in_the_whole_model(megatron_learner: Arm, layout: str) -> None:
    metrics = megatron_learner("measured")[layout]["first_scale"]["metrics"][0]
    groups = {name.rpartition("/")[2] for name in metrics if name.startswith("fp16/underflow/")}
    # The mixture has two layers, the pipeline two stages of two.
    layers = {"pp": {"early_layers", "middle_layers", "late_layers"}, "ep": {"early_layers", "middle_layers"}}[layout]
    assert groups == {"embedding", "head", *layers}


def test_the_scale_grows_into_an_overflow_by_torchs_rule_and_not_ahead(megatron_learner: Arm) -> None:
    blind, ahead = (megatron_learner(arm)["pp"]["grown"] for arm in ("torchs-rule", "ahead"))

    def retries(facts: Facts) -> float:
        return sum(max(values(metrics, "fp16/retries/max")) for metrics in facts["metrics"])

    assert blind["bearable"] == ahead["bearable"]
    assert retries(blind) > 0 == retries(ahead)
    # Gradients twice as large still fit at the scale it stays at.
    assert ahead["scales"] == [ahead["bearable"] / 2]


def test_stock_ends_where_megatron_checks_gradients_itself(megatron_learner: Arm) -> None:
    for error in megatron_learner("stock")["dp"]["checked_gradients"]["errors"]:
        assert "found NaN in local grad norm" in error


def test_an_overflow_is_the_scalers_where_megatron_was_to_check_gradients(megatron_learner: Arm) -> None:
    facts = megatron_learner("skip")["dp"]["checked_gradients"]
    assert facts == {"errors": [None, None], "scales": [TOO_HIGH / 2]}


@pytest.mark.parametrize("layout", ["tp", "ep"])
def test_exported_weights_score_as_the_learner_does(megatron_learner: Arm, layout: str) -> None:
    facts = megatron_learner("skip")[layout]["exported"]
    assert facts["dtypes"] == ["float16"]
    assert facts["log_prob_error"] < 5e-3


def test_stock_exports_weights_of_which_a_part_is_a_step_old(megatron_learner: Arm) -> None:
    facts = megatron_learner("stock")["dp"]["overlapped"]
    assert facts["after_a_step"]["log_prob_error"] > 0.1
    assert facts["after_a_forward_pass"]["log_prob_error"] < 5e-3


@pytest.mark.parametrize("cell", ["dp", "dp+offload"])
def test_weights_are_gathered_before_they_are_exported(megatron_learner: Arm, cell: str) -> None:
    facts = megatron_learner("skip")[cell]["overlapped"]
    assert facts["after_a_step"] == facts["after_a_forward_pass"]
    assert facts["after_a_step"]["log_prob_error"] < 5e-3


def test_stock_cannot_load_its_own_checkpoint(megatron_learner: Arm) -> None:
    facts = megatron_learner("stock")["dp"]["resumed"]
    assert facts["errors"] == ["AttributeError: 'bool' object has no attribute 'dtype'"] * 2


def test_a_resumed_run_goes_on_bit_for_bit(megatron_learner: Arm) -> None:
    facts = megatron_learner("skip")["ep"]["resumed"]
    assert facts["errors"] == [None, None]
    assert facts["saved"] == facts["resumed"]
    assert (facts["saved"]["scales"], facts["saved"]["growth"], facts["saved"]["schedule"]) == ([32768.0], 2, 2)
    first, second = facts["steps"]
    assert first == second
    assert values(first, "fp16/skipped_total/max") == {1.0}
    assert facts["same_state"]
    assert facts["same_next_state"]


def test_the_scale_of_megatrons_own_checkpoint_is_gone_on_with_and_not_measured_anew(megatron_learner: Arm) -> None:
    facts = megatron_learner("measured")["ep"]["resumed_alone"]
    # A count beyond the interval would never reach it.
    assert (facts["resumed"]["scales"], facts["resumed"]["growth"]) == ([LOW], Plan().growth_interval - 1)
    assert max(facts["next"]["scales"]) <= 2 * LOW
    assert values(facts["metrics"], "fp16/skipped_total/max") == {0.0}
    log = megatron_learner("measured")["log"]
    assert log.count("no loss-scaler state of fp16_patch in ") == log.count("own checkpoint, 32, and steps are") == 1
    assert "the scale starts as in a new run" not in log
