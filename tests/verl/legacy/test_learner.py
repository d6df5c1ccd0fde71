"""verl's workers of before 0.8.0 with and without a plan: each defect is seen on stock verl first, then gone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from integration.cpu.warm.servers import IMPORTS
from tests.conftest import verl_environment
from tests.installed_release import ORACLE
from tests.ranks import RANKS, Facts, Ranks

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("verl.workers.fsdp_workers") is None:
    pytest.skip("verl 0.8.0 and newer have no such workers", allow_module_level=True)

LEARNER = Path(__file__).parent / "legacy_learner.py"
STRATEGIES = ("fsdp", "fsdp2")
ROLES = ("actor", "critic")
WITH_A_SCALER = ("overflow_on_one_rank", "averaged_norm", "resume", "exports", "endless_overflow")
ARMS: dict[str, tuple[list[str], tuple[str, ...], dict[str, str]]] = {
    # The key that FSDP reads in every release; autocast and scaler do not.
    "stock": (["--fp16", "mixed_precision"], ("compute_dtypes", "rope", "small_gradients"), {}),
    # The key that verl documents, since 0.6.1, and a scaler that works, as it would on a GPU.
    "stock-documented": (
        ["--fp16", "documented", "--working-scaler"],
        ("compute_dtypes", "temperature", *WITH_A_SCALER),
        {},
    ),
    "stock-on-a-cpu": (["--fp16", "documented"], ("overflow_on_one_rank",), {}),
    "plan": (
        [],
        (
            "compute_dtypes",
            "rope",
            "oracle",
            "wire",
            "small_gradients",
            "temperature",
            *WITH_A_SCALER,
            "resume_from_stock",
        ),
        {"FP16_PATCH": "1"},
    ),
}


@pytest.fixture(scope="session")
def learner(
    on_ranks: Ranks, tiny_model: Path, tiny_value_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Facts]:
    """Run an arm's scenarios once for each strategy and number of ranks; what they found."""
    known: dict[tuple[str, str, int], Facts] = {}
    models = ["--model", str(tiny_model), "--value-model", str(tiny_value_model)]

    def run(arm: str, strategy: str, ranks: int) -> Facts:
        if (arm, strategy, ranks) not in known:
            out = tmp_path_factory.mktemp(f"{arm}_{strategy}_{ranks}")
            options, scenarios, env = ARMS[arm]
            # verl 0.5.0 imports no external modules.
            external = ["--import", "fp16_patch.verl"] if env else []
            arguments = ["--strategy", strategy, "--out", str(out), *models, *external, *options, *scenarios]
            facts = on_ranks.facts(LEARNER, arguments, ranks, out, verl_environment(env), IMPORTS)
            known[arm, strategy, ranks] = {"out": out, **facts}
        return known[arm, strategy, ranks]

    return run


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def native(learner: Callable[..., Facts], strategy: str, role: str) -> Callable[[str], Facts]:
    """What stock verl does with the scaler it has; skips the test where it has none."""
    facts = learner("stock-documented", strategy, 2)
    if facts["overflow_on_one_rank"][role]["scaler"]["scale"] is None:
        pytest.skip(f"stock: the {role} of this release has no scaler, so its gradients vanish")
    return lambda scenario: facts[scenario][role]  # type: ignore[no-any-return]


def test_stock_computes_in_bfloat16_though_fsdp_is_told_float16(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock", strategy, 2)["compute_dtypes"]
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(facts, ["bfloat16"])
    assert not any(fact["scaler"] for fact in facts.values())


def test_stock_critic_and_reward_model_ignore_the_documented_key(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("stock-documented", strategy, 2)["compute_dtypes"]
    without = set(facts) - {"actor", "ref"}
    assert {facts[role]["output"] for role in without} == {"bfloat16"}
    assert {facts[role]["dtypes"][0] for role in without} == {"bfloat16"}


def test_every_role_computes_in_float16(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["compute_dtypes"]
    assert {"actor", "critic", "ref"} <= set(facts)
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(facts, ["float16"])


def test_stock_rounds_the_rope_frequencies_of_models_stored_in_half(
    learner: Callable[..., Facts], strategy: str
) -> None:
    facts = learner("stock", strategy, 2)["rope"]
    assert min(facts.values()) > 1e-4


def test_rope_frequencies_stay_in_float32(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["rope"]
    assert facts == dict.fromkeys(facts, 0.0)


def test_log_probs_values_and_rewards_are_float32(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["compute_dtypes"]
    assert {role: fact["output"] for role, fact in facts.items()} == dict.fromkeys(facts, "float32")


def test_only_learners_that_train_have_a_scaler(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["compute_dtypes"]
    assert {role for role, fact in facts.items() if fact["scaler"]} == {"actor", "critic"}


def test_the_same_step_is_taken_in_every_release(learner: Callable[..., Facts], strategy: str, role: str) -> None:
    facts = learner("plan", strategy, 2)["oracle"][role]
    assert (facts["grad_norm"], facts["moved"]) == pytest.approx(ORACLE[role], rel=1e-4)


def test_masters_are_sent_to_the_sampler_as_they_are(learner: Callable[..., Facts], strategy: str) -> None:
    facts = learner("plan", strategy, 2)["wire"]
    if facts is None:
        pytest.skip("verl 0.5.0 sends weights by a sharding manager, which needs vLLM")
    assert facts == {"dtypes": ["float32"], "exact": True}


def test_stock_loses_small_gradients(learner: Callable[..., Facts], strategy: str, role: str) -> None:
    assert learner("stock", strategy, 2)["small_gradients"][role] < 0.9


def test_small_gradients_survive(learner: Callable[..., Facts], strategy: str, ranks: int, role: str) -> None:
    assert learner("plan", strategy, ranks)["small_gradients"][role] == pytest.approx(1.0, abs=0.01)


def test_stock_scaler_is_off_away_from_cuda_and_steps_on_nan(
    learner: Callable[..., Facts], native: Callable[[str], Facts], strategy: str, role: str
) -> None:
    facts = learner("stock-on-a-cpu", strategy, 2)["overflow_on_one_rank"][role]
    assert facts["scaler"]["scale"] is None
    assert facts["nan_parameters"] > 0


def test_an_overflow_on_one_rank_changes_no_parameter(
    learner: Callable[..., Facts], strategy: str, ranks: int, role: str
) -> None:
    facts = learner("plan", strategy, ranks)["overflow_on_one_rank"][role]
    assert facts["unchanged_on_every_rank"]
    assert facts["nan_parameters"] == 0
    assert facts["moved_by_a_clean_step"]
    assert facts["scaler"] == {"scale": 32768.0, "growth": 1}


def test_stock_advances_the_schedule_on_a_skip_and_says_nothing(
    learner: Callable[..., Facts], strategy: str, role: str
) -> None:
    facts = learner("stock-documented", strategy, 2)["overflow_on_one_rank"][role]
    assert facts["unchanged_on_every_rank"]  # it did skip
    before, after, _ = facts["lr"]
    assert after > before
    assert not facts["overflow_metrics"]


def test_the_schedule_holds_on_a_skip_and_goes_on_after_it(
    learner: Callable[..., Facts], strategy: str, ranks: int, role: str
) -> None:
    before, after, last = learner("plan", strategy, ranks)["overflow_on_one_rank"][role]["lr"]
    assert before == after < last


def test_a_skip_is_in_the_metrics(learner: Callable[..., Facts], strategy: str, ranks: int, role: str) -> None:
    facts = learner("plan", strategy, ranks)["overflow_on_one_rank"][role]

    def seen(metrics: str) -> list[float]:
        names = ("loss_scale/min", "step_skipped", "skipped_total/max", "consecutive_skips/max")
        return [facts[metrics][f"fp16/{name}"][0] for name in names]

    assert seen("clean_metrics") == [65536.0, 0.0, 0.0, 0.0]
    assert seen("overflow_metrics") == [32768.0, 1.0, 1.0, 1.0]
    assert seen("last_metrics") == [32768.0, 0.0, 1.0, 0.0]


def test_stock_averages_the_norm_of_a_skipped_step(learner: Callable[..., Facts], strategy: str, role: str) -> None:
    norm = learner("stock-documented", strategy, 2)["averaged_norm"][role][f"{role}/grad_norm"]
    assert norm != norm or norm == float("inf")


def test_the_norm_of_a_skipped_step_is_averaged_into_nothing(
    learner: Callable[..., Facts], strategy: str, ranks: int, role: str
) -> None:
    metrics = learner("plan", strategy, ranks)["averaged_norm"][role]
    assert 0 < metrics[f"{role}/grad_norm"] < 1e3
    assert metrics[f"{role}/fp16/step_skipped"] == 0.5
    assert metrics[f"{role}/fp16/skipped_total/max"] == 1.0


def test_stock_resumes_at_the_initial_scale(native: Callable[[str], Facts]) -> None:
    facts = native("resume")
    assert facts["saved"]["scale"] == 32768.0
    assert facts["resumed"]["scale"] == 65536.0


def test_a_resumed_run_goes_on_with_scale_and_growth_counter(
    learner: Callable[..., Facts], strategy: str, ranks: int, role: str
) -> None:
    facts = learner("plan", strategy, ranks)["resume"][role]
    assert facts["saved"] == facts["resumed"] == {"scale": 32768.0, "growth": 2}
    assert facts["next"] == {"scale": 32768.0, "growth": 3}


def test_a_checkpoint_without_scaler_state_resumes_with_one_warning(
    learner: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = learner("plan", strategy, ranks)
    assert facts["resume_from_stock"]["scale"] == 65536.0
    assert (facts["out"] / "log.txt").read_text().count("no loss-scaler state in") == 1


def test_stock_lets_the_scale_fall_to_zero_in_silence(native: Callable[[str], Facts]) -> None:
    facts = native("endless_overflow")
    assert facts["error"] is None
    assert facts["scale"] == 0.0


def test_endless_overflow_stops_and_names_rank_step_and_parameter(
    learner: Callable[..., Facts], strategy: str, ranks: int, role: str
) -> None:
    facts = learner("plan", strategy, ranks)["endless_overflow"][role]
    assert facts["error"] == "LossScaleCollapse"
    assert f"{role}: " in facts["message"]
    assert f"optimizer step {facts['attempt'] + 1}:" in facts["message"]
    assert "setting min_scale=1" in facts["message"]
    assert f"rank {ranks - 1}: model." in facts["message"]


def test_stock_divides_by_the_temperature_in_the_compute_dtype(learner: Callable[..., Facts], strategy: str) -> None:
    assert learner("stock-documented", strategy, 2)["temperature"]["largest_error"] > 1e-5


def test_log_probs_are_those_of_float32_arithmetic(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    facts = learner("plan", strategy, ranks)["temperature"]
    assert facts["logits"] == "float16"
    assert facts["largest_error"] < 1e-5


def test_stock_exports_float32_labelled_bfloat16(learner: Callable[..., Facts]) -> None:
    assert learner("stock-documented", "fsdp2", 2)["exports"] == {"label": "bfloat16", "held": ["float32"]}


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 1), ("fsdp2", 1), ("fsdp2", 2)])
def test_exports_are_float16_and_say_so(learner: Callable[..., Facts], strategy: str, ranks: int) -> None:
    assert learner("plan", strategy, ranks)["exports"] == {"label": "float16", "held": ["float16"]}


@pytest.mark.parametrize(("env", "dtype"), [({}, "bfloat16"), ({"FP16_PATCH": "1"}, "float16")], ids=["stock", "plan"])
def test_merged_checkpoints_hold_what_their_label_says(
    learner: Callable[..., Facts], warm_python: Path, tmp_path: Path, env: dict[str, str], dtype: str
) -> None:
    from tests.verl.folder import folder_facts

    shards = learner("plan", "fsdp2", 2)["resume"]["actor"]["path"]
    # verl before 0.9.0 finds us by no entry point.
    module = ["-c", "import fp16_patch.autoload, runpy; runpy.run_module('verl.model_merger', run_name='__main__')"]
    merge = [warm_python, *module, "merge", "--backend", "fsdp", "--local_dir", shards]
    subprocess.run([*merge, "--target_dir", str(tmp_path)], env=verl_environment(env), check=True, timeout=300)
    assert folder_facts(tmp_path) == {"label": dtype, "held": [dtype]}
