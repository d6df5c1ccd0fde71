"""OpenRLHF's DeepSpeed learner with and without a plan: each defect is seen on stock OpenRLHF first, then gone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp16_patch.patching.declarations import Status
from tests.conftest import openrlhf_environment
from tests.installed_release import needs, verdict_on
from tests.ranks import RANKS, Facts, Ranks

pytestmark = [pytest.mark.openrlhf, pytest.mark.e2e]
pytest.importorskip("openrlhf")

LEARNER, PRELOAD = Path(__file__).parents[1] / "learner.py", "integration.cpu.warm.imports_of_openrlhf"
FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))
# A floor above 1, so that it is not DeepSpeed's default that is met.
FLOOR = 4
RETRY = {"FP16_PATCH_MIN_SCALE": str(FLOOR), "FP16_PATCH_GROWTH_INTERVAL": "300"}
PLAN = {**RETRY, "FP16_PATCH_ON_OVERFLOW": "skip"}
SCENARIOS = ("configuration", "frozen", "overflow_on_one_rank", "endless_overflow", "growing_scale", "resume")
SHORT = SCENARIOS[:2]
# Where OpenRLHF has no float16, what DeepSpeed does in it is seen with DeepSpeed's configuration completed by hand.
STOCK = "by hand" if verdict_on("actor-dtype").status is Status.APPLIES else "stock"
ROLES = ("actor", "critic")
ARMS = {"plan": [], "retry": [], "stock": ["--param-dtype", "fp16"], "by hand": ["--param-dtype", "fp16", "--by-hand"]}


@pytest.fixture(scope="session")
def learner(on_ranks: Ranks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Facts]:
    """Run scenarios once for each arm, ZeRO stage and number of ranks; what they found."""
    known: dict[tuple[str, int, int], Facts] = {}

    def run(arm: str, stage: int = 2, ranks: int = 2) -> Facts:
        if (arm, stage, ranks) not in known:
            out = tmp_path_factory.mktemp(f"{arm.replace(' ', '_')}_zero{stage}_{ranks}")
            where = ["--model", str(tiny_model), "--out", str(out), "--zero-stage", str(stage)]
            arguments = [*where, *ARMS[arm], *_scenarios(arm)]
            settings = {"plan": PLAN, "retry": RETRY}.get(arm)
            prefix, env = ([], {}) if settings is None else ([FP16_PATCH, "run", "--"], settings)
            facts = on_ranks.facts(LEARNER, arguments, ranks, out, openrlhf_environment(env), PRELOAD, prefix)
            known[arm, stage, ranks] = {"out": out, **facts}
        return known[arm, stage, ranks]

    return run


def _scenarios(arm: str) -> tuple[str, ...]:
    if arm == "retry":
        return ("retried", "lost")
    if arm == "plan":
        # Stock gradients in float16 are too small for it.
        return (*SCENARIOS, "infinite_norm", "lost")
    return SCENARIOS if arm == STOCK else SHORT


@pytest.fixture(params=(2, 3), ids=("zero2", "zero3"))
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@needs("actor-dtype")
@needs("regression-dtype")
def test_stock_without_its_bf16_switch_trains_in_the_dtype_that_is_stored(learner: Callable[..., Facts]) -> None:
    for role in ROLES:
        facts = learner("stock")["configuration"][role]
        assert facts["parameters"] == facts["outputs"] == ["float32"]
        assert facts["scale"] is None


@needs("strategy-frozen-dtype")
def test_stock_without_its_bf16_switch_scores_in_the_dtype_that_is_stored(learner: Callable[..., Facts]) -> None:
    for facts in learner("stock")["frozen"].values():
        assert facts["parameters"] == facts["outputs"] == ["float32"]


def test_reference_and_reward_model_compute_in_float16_and_rope_stays_float32(
    learner: Callable[..., Facts], stage: int
) -> None:
    for facts in learner("plan", stage)["frozen"].values():
        assert facts["parameters"] == facts["outputs"] == ["float16"]
        assert facts["rope"] == ["float32"]


def test_stock_leaves_the_scaler_to_deepspeeds_defaults(learner: Callable[..., Facts]) -> None:
    for role in ROLES:
        facts = learner(STOCK)["configuration"][role]
        assert (facts["window"], facts["hysteresis"], facts["floor"]) == (1000, 2, 1)


def test_the_scaler_has_the_plans_settings(learner: Callable[..., Facts], stage: int) -> None:
    for role in ROLES:
        facts = learner("plan", stage)["configuration"][role]
        assert (facts["window"], facts["hysteresis"], facts["floor"]) == (300, 1, FLOOR)


def test_stock_reduces_and_adds_up_gradients_in_float16(learner: Callable[..., Facts]) -> None:
    facts = learner(STOCK)["configuration"]["actor"]
    assert facts["communication"] == "float16"
    assert facts["accumulation"] == ["float16"]


def test_gradients_are_reduced_and_added_up_in_float32(learner: Callable[..., Facts], stage: int) -> None:
    for role in ROLES:
        facts = learner("plan", stage)["configuration"][role]
        assert facts["communication"] == facts["master"] == "float32"
        assert facts["accumulation"] == ["float32"]


def test_stock_rounds_ropes_frequencies_under_zero_3(learner: Callable[..., Facts]) -> None:
    assert learner(STOCK, 3)["configuration"]["actor"]["rope"] == ["float16"]


def test_actor_and_critic_compute_in_float16_and_rope_stays_float32(learner: Callable[..., Facts], stage: int) -> None:
    for role in ROLES:
        facts = learner("plan", stage)["configuration"][role]
        assert facts["parameters"] == facts["outputs"] == ["float16"]
        assert facts["rope"] == ["float32"]


def test_an_overflow_on_one_rank_changes_no_weight_and_holds_the_schedule(
    learner: Callable[..., Facts], stage: int
) -> None:
    facts = learner("plan", stage)["overflow_on_one_rank"]
    assert facts["unchanged_on_every_rank"]
    assert facts["lr_held"]
    assert facts["scale_after"] == facts["scale_before"] / 2
    assert facts["lr_moves_again"]
    assert facts["trains_again"]
    assert facts["skipped_of_attempted"] == [1, 4]


@pytest.fixture(params=ROLES)
def ppo(request: pytest.FixtureRequest, learner: Callable[..., Facts], stage: int, ranks: int) -> Facts:
    """What OpenRLHF's own PPO trainer did from too high a scale, and from the one it found."""
    facts = learner("retry", stage, ranks)["retried"]
    if not facts:
        pytest.skip("this release's trainer is not driven here")
    role: Facts = facts[request.param]
    return role


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_an_update_tried_again_is_bit_for_bit_the_one_from_the_scale_it_ends_at(ppo: Facts) -> None:
    assert ppo["dropout_matters"]
    assert ppo["found"]["forwards"] > ppo["clean"]["forwards"] == 6  # three updates of two micro-batches
    assert ppo["same"] == dict.fromkeys(ppo["same"], True)
    assert {"state", "averages", "random"} <= set(ppo["same"])


def test_what_is_tried_again_counts_once(ppo: Facts) -> None:
    steps, _, skipped = ppo["found"]["steps"]
    assert (steps, skipped) == (3, 0)
    assert ppo["found"]["statuses"] == ppo["clean"]["statuses"]
    assert ppo["found"]["average_clock"] in (0, 6)  # no averages of a critic, or under ZeRO 3


@pytest.mark.parametrize(("arm", "taken"), [("plan", 3), ("retry", 6)])
def test_no_update_is_lost_to_huge_advantages(learner: Callable[..., Facts], stage: int, arm: str, taken: int) -> None:
    facts = learner(arm, stage)["lost"]
    if not facts:
        pytest.skip("this release's trainer is not driven here")
    assert facts == {"taken": taken, "attempted": 6}


def test_stock_ends_without_saying_where(learner: Callable[..., Facts]) -> None:
    facts = learner(STOCK)["endless_overflow"]
    assert facts["error"] == "Exception"
    assert "weight" not in facts["message"]


def test_a_collapse_names_role_step_rank_and_parameters(learner: Callable[..., Facts], stage: int) -> None:
    facts = learner("plan", stage)["endless_overflow"]
    assert facts["error"] == "LossScaleCollapse"
    # 65536 is 2**14 above the floor of 4: 14 halvings, and one more overflow.
    assert facts["attempts"] == 15
    assert "actor: loss scale collapsed at optimizer step 15" in facts["message"]
    assert f"setting min_scale={FLOOR}" in facts["message"]
    assert "rank 0: model." in facts["message"]


def test_stock_halves_the_gradient_of_the_update_at_which_the_scale_doubles(learner: Callable[..., Facts]) -> None:
    facts = learner(STOCK)["growing_scale"]
    grown = [after > before for before, after in zip(facts["scales"], facts["scales"][1:], strict=False)]
    assert any(grown)
    for norm, doubled in zip(facts["norms"], grown, strict=True):
        assert norm == pytest.approx(facts["norms"][0] / (2 if doubled else 1), rel=0.02)


def test_an_update_at_which_the_scale_doubles_takes_the_whole_gradient(
    learner: Callable[..., Facts], stage: int
) -> None:
    facts = learner("plan", stage)["growing_scale"]
    assert facts["scales"][-1] > facts["scales"][0]
    assert facts["norms"] == pytest.approx([facts["norms"][0]] * len(facts["norms"]), rel=0.02)


def test_gradients_whose_norm_fp32_does_not_hold_are_a_skipped_update_where_it_is_taken_in_fp32(
    learner: Callable[..., Facts], stage: int
) -> None:
    facts = learner("plan", stage)["infinite_norm"]
    # ZeRO 3 takes it in FP64, where it is finite: it clips by that, and steps.
    skipped = stage == 2
    assert (facts["unchanged_on_every_rank"], facts["lr_held"], facts["halved"]) == (skipped, skipped, 1.0 + skipped)
    assert facts["skipped_of_attempted"] == [int(skipped), 4]
    assert facts["trains_again"]


def test_a_stock_run_resumes_at_a_scale_of_nan_on_one_rank(learner: Callable[..., Facts]) -> None:
    assert not learner(STOCK)["resume"]["undamaged_everywhere"]


def test_a_scaler_damaged_on_one_rank_goes_on_at_the_other_ranks_scale(
    learner: Callable[..., Facts], stage: int
) -> None:
    facts = learner("plan", stage)
    assert facts["resume"]["undamaged_everywhere"]
    warnings = [line for line in (facts["out"] / "log.txt").read_text().splitlines() if "not all can be used" in line]
    (warning,) = warnings
    assert "its cur_scale is nan" in warning


def test_a_stock_scaler_resumes_with_the_settings_of_the_run_that_saved_it(learner: Callable[..., Facts]) -> None:
    facts = learner(STOCK)["resume"]
    assert facts["window"] == 50
    assert facts["counted"] == {"attempted": None, "skipped_total": None, "consecutive_skips": None}


def test_a_resumed_run_goes_on_with_scale_and_counters(learner: Callable[..., Facts], stage: int) -> None:
    facts = learner("plan", stage)["resume"]
    assert facts["saved"] == {"scale": 32768.0, "iteration": 2}
    assert facts["fresh"] == 65536.0
    assert facts["resumed"] == facts["saved"]
    assert facts["counted"] == {"attempted": 2, "skipped_total": 1, "consecutive_skips": 0}
    assert facts["client_state"] == 7
    assert facts["window"] == 300
    assert facts["trains"]
