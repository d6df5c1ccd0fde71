"""VeOmni's engine with and without a plan, on VeOmni itself: it shards on two ranks or more."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec

import pytest

from fp16_patch.patching.fingerprint import parsed
from fp16_patch.patching.sources import Installed
from tests.installed_release import ORACLE
from tests.verl.conftest import Facts
from tests.verl.fsdp.skips import assert_each_rank_tells_of_the_skip

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("veomni") is None:
    pytest.skip("VeOmni is not installed here", allow_module_level=True)

# As in `learner.py`.
TOO_HIGH, FITTING = 2.0**21, 128.0
Learner = Callable[..., Facts]


def test_stock_ignores_the_documented_dtype_key_and_has_no_scaler(learner: Learner) -> None:
    facts = learner("stock", "veomni", 2)["compute_dtypes"]
    assert facts == dict.fromkeys(("actor", "critic", "ref"), {"dtypes": ["bfloat16"], "scaler": False})


def test_actor_critic_and_ref_compute_in_float16_and_those_that_train_have_a_scaler(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["compute_dtypes"]
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(
        ("actor", "critic", "ref"), ["float16"]
    )
    assert {role: fact["scaler"] for role, fact in facts.items()} == {"actor": True, "critic": True, "ref": False}


def test_the_step_is_that_of_the_fsdp_engine(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["oracle"]
    assert (facts["grad_norm"], facts["moved"]) == pytest.approx(ORACLE["actor"], rel=1e-4)


def test_stock_advances_the_schedule_on_a_skip_and_says_nothing(learner: Learner) -> None:
    facts = learner("stock", "veomni", 2)["overflow_on_one_rank"]
    assert facts["unchanged_on_every_rank"]  # it did skip
    before, after, _ = facts["lr"]
    assert after > before
    assert not [name for name in facts["overflow_metrics"] if name.startswith("fp16/")]


def test_an_overflow_on_one_rank_is_a_skip_on_all_and_holds_the_schedule(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["overflow_on_one_rank"]
    assert facts["unchanged_on_every_rank"]
    assert facts["nan_parameters"] == 0
    assert facts["moved_by_a_clean_step"]
    before, after, last = facts["lr"]
    assert before == after < last

    assert_each_rank_tells_of_the_skip(facts)


def test_an_update_tried_again_is_bit_for_bit_the_one_from_the_scale_it_ends_at(learner: Learner) -> None:
    facts = learner("retry", "veomni", 2)["retried"]
    assert facts["dropout_matters"]
    # Three updates of two micro-batches, the first of them with five halvings.
    assert (facts["found"]["computed"], facts["clean"]["computed"]) == (16, 6)
    assert facts["found"]["scales"] == [TOO_HIGH / 2**5] * 3
    assert facts["same"] == dict.fromkeys(("state", "random", "losses", "norms", "lr"), True)


@pytest.mark.parametrize(("arm", "taken"), [("plan", 3), ("retry", 6)])
def test_no_mini_batch_is_lost_to_one_steep_one(learner: Learner, arm: str, taken: int) -> None:
    facts = learner(arm, "veomni", 2)["lost"]
    assert facts["taken"] == taken
    assert facts["metrics"][-1]["fp16/skipped_total/max"] == [[6.0 - taken]] * 2


def test_an_infinite_loss_is_skipped_and_not_tried_again(learner: Learner) -> None:
    facts = learner("retry", "veomni", 2)["infinite_loss"]
    assert facts["halved"] == 2.0
    assert facts["computed"] == 4
    assert facts["metrics"]["fp16/step_skipped"] == [[1.0]] * 2


def test_ranks_that_share_no_gradient_skip_together(learner: Learner) -> None:
    assert learner("retry", "veomni", 2)["alone"] == {"unchanged_on_every_rank": True, "scale": 32768.0}


def test_a_measured_first_scale_leaves_nothing_to_look_for_and_no_trace(learner: Learner) -> None:
    measured = learner("measured", "veomni", 2)["first_scale"]["too_high"]
    fixed = learner("retry", "veomni", 2)["first_scale"]["fitting"]
    assert measured["scales"] == [FITTING] * 3
    assert measured["computed"] > fixed["computed"] == 6
    names = ("state", "random", "losses", "norms", "scales", "lr")
    assert {name: measured[name] for name in names} == {name: fixed[name] for name in names}


def test_finite_gradients_of_an_infinite_norm_are_a_skipped_step(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["vast_norm"]
    assert facts == {"norm": "inf", "unchanged_on_every_rank": True, "halved": 2.0}


def test_several_optimizers_skip_together_under_one_scale(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["several_optimizers"]
    assert facts["optimizers"] == 2
    assert facts["unchanged_on_every_rank"]
    assert facts["moved_by_a_clean_step"]
    scales = [{value for [value] in metrics["fp16/loss_scale/min"]} for metrics in facts["metrics"]]
    assert scales == [{65536.0}, {32768.0}, {32768.0}]
    # As with one: what is clipped are unscaled gradients.
    assert (
        facts["metrics"][0]["grad_norm"]
        == learner("plan", "veomni", 2)["overflow_on_one_rank"]["clean_metrics"]["grad_norm"]
    )


def test_the_norm_of_a_skipped_step_is_averaged_into_nothing(learner: Learner) -> None:
    metrics = learner("plan", "veomni", 2)["averaged_norm"]
    assert 0 < metrics["grad_norm"] < 1e3
    assert metrics["fp16/step_skipped"] == 0.5


def test_a_resumed_run_goes_on_with_scale_and_growth_counter(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)
    assert facts["resume"]["saved"] == facts["resume"]["resumed"] == {"scale": 32768.0, "growth": 2}
    assert facts["resume"]["next"] == {"scale": 32768.0, "growth": 3}
    assert facts["resume_from_stock"]["scale"] == 65536.0


def test_exports_are_float16_and_say_so(learner: Learner) -> None:
    assert learner("plan", "veomni", 2)["exports"] == {"label": "float16", "held": ["float16"]}


def test_a_collapse_stops_the_run_and_names_rank_and_parameter(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["endless_overflow"]
    assert (facts["error"], facts["scale"]) == ("LossScaleCollapse", 1.0)
    assert "Non-finite gradients in rank 1: model.embed_tokens.weight" in facts["message"]


def test_masters_are_sent_as_they_are_until_the_samplers_have_said_what_they_keep(learner: Learner) -> None:
    for arm in ("stock", "plan"):
        sent = learner(arm, "veomni", 2)["wire"]
        assert (sent["dtypes"], sent["exact"]) == (["float32"], True)


def test_then_weights_are_gathered_and_sent_in_float16_to_the_same(learner: Learner) -> None:
    facts = learner("plan", "veomni", 2)["wire_after_clearance"]
    before, after = facts["nothing"]["before"], facts["nothing"]["after"]
    assert [sync["gathered"] for sync in after] == [["float16"]] * 2
    assert [2 * sync["bytes"] for sync in after] == [sync["bytes"] for sync in before]
    assert len({sync["rounded"] for sync in (*before, *after)}) == 1
    kept = {name for name, dtype in facts["some"]["after"][-1]["dtypes"].items() if dtype == "float32"}
    assert kept
    assert all(name.endswith("input_layernorm.weight") for name in kept)


def test_stock_divides_by_the_temperature_in_half_and_the_plan_in_float32(learner: Learner) -> None:
    stock, planned = (learner(arm, "veomni", 2)["temperature"] for arm in ("stock", "plan"))
    assert (stock["0.7"]["logits"], planned["0.7"]["logits"]) == (["bfloat16"], ["float16"])
    assert stock["0.7"]["largest_error"] > 1e-5 > planned["0.7"]["largest_error"]
    assert planned["0.0"]["finite"]


def test_the_chunked_kernel_rounds_where_its_refusal_says_so() -> None:
    source = Installed().read("veomni.ops.kernels.cross_entropy.chunk_logprobs") or ""
    forward, backward = (parsed(source, f"_ChunkedLinearLogProbs.{name}") for name in ("forward", "backward"))
    assert forward is not None
    assert backward is not None
    assert lines(forward).index("logits = logits / temperature") < lines(forward).index("logits = logits.float()")
    assert "torch.zeros_like(weight)" in ast.unparse(backward)
    assert "dweight += dlogits.t() @ h_chunk" in lines(backward)


def lines(function: ast.AST) -> list[str]:
    return [line.strip() for line in ast.unparse(function).splitlines()]
