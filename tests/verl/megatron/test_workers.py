"""verl's Megatron workers of before 0.8.0, real Megatron, on two ranks: each defect is seen on stock verl first."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

pytestmark = [pytest.mark.verl, pytest.mark.megatron, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("verl.workers.megatron_workers") is None:
    pytest.skip("verl 0.8.0 and newer have no such workers", allow_module_level=True)
for package in ("megatron.core", "mbridge"):
    pytest.importorskip(package)

from integration.cpu.launch import MEGATRON_ENVIRONMENT
from integration.cpu.warm.servers import IMPORTS
from tests.conftest import verl_environment
from tests.ranks import Facts, Ranks

LEARNER = Path(__file__).parent / "workers_learner.py"
LAYOUTS, ROLES = ("dp", "tp", "pp"), ("actor", "critic")
RELEASE = Version(version("verl"))
READS_THE_DTYPE = Version("0.6.1") <= RELEASE
BOTH = "built,overflow_on_one_rank"
# Arm → arguments, and the environment. verl 0.5.0 imports no external modules.
ARMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "stock": ([*(["--fp16"] if READS_THE_DTYPE else []), f"dp:{BOTH}"], {}),
    "plan": (
        ["--import", "fp16_patch.verl", f"dp:{BOTH},wire,resumed", f"tp:{BOTH},wire", f"pp:{BOTH},wire"],
        {"FP16_PATCH": "1", "FP16_PATCH_INIT_SCALE": "65536"},
    ),
}


@pytest.fixture(scope="module")
def workers(on_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Facts]:
    """Run scenarios of `workers_learner.py` once for each arm, on two ranks: layout → scenario → what it found."""
    from integration.cpu.tiny_families import write_family

    # Untied: the bridge looks for the head's weight, though a value's takes its place.
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = write_family("qwen2", tmp_path_factory.mktemp("untied"), **sizes)
    known: dict[str, Facts] = {}

    def run(arm: str) -> Facts:
        if arm not in known:
            out = tmp_path_factory.mktemp(f"workers_{arm}")
            arguments, env = ARMS[arm]
            options = ["--model", str(model), "--out", str(out), *arguments]
            known[arm] = on_ranks.facts(
                LEARNER, options, 2, out, verl_environment({**MEGATRON_ENVIRONMENT, **env}), IMPORTS
            )
        return known[arm]

    return run


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """How two ranks share the work: data, tensor or pipeline parallel."""
    return str(request.param)


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def overflow(workers: Callable[[str], Facts], layout: str, role: str) -> Facts:
    """What became of an overflow of the last rank."""
    if role == "critic" and not READS_THE_DTYPE and layout == "dp":
        pytest.skip("before 0.6.1 verl tells Megatron to reduce the actor's gradients only: a rank steps by its own")
    return workers("plan")[layout]["overflow_on_one_rank"][role]  # type: ignore[no-any-return]


def test_stock_has_no_float16_before_0_6_1(workers: Callable[[str], Facts]) -> None:
    built = workers("stock")["dp"]["built"]
    expected = "float16" if READS_THE_DTYPE else "bfloat16"
    assert {facts["parameters"][0] for facts in built.values()} == {expected}


def test_stock_ends_at_an_overflow_of_one_rank(workers: Callable[[str], Facts], role: str) -> None:
    if not READS_THE_DTYPE:
        pytest.skip("stock: bfloat16, without a loss scale")
    errors = workers("stock")["dp"]["overflow_on_one_rank"][role]["errors"]
    assert [error.partition(":")[0] for error in errors] == ["NotImplementedError"] * 2


@pytest.mark.parametrize("part", ["actor", "ref", "critic"])
def test_parameters_are_float16_and_gradients_add_up_in_float32(
    workers: Callable[[str], Facts], layout: str, part: str
) -> None:
    facts = workers("plan")[layout]["built"][part]
    assert (facts["parameters"], facts["main_grads"]) == (["float16"], [] if part == "ref" else ["float32"])


@pytest.mark.parametrize("part", ["actor", "ref"])
def test_log_probs_are_those_of_transformers(workers: Callable[[str], Facts], layout: str, part: str) -> None:
    # Tensor-parallel ranks add up in another order.
    assert workers("plan")[layout]["built"][part]["log_prob_error"] < (5e-3 if layout == "tp" else 1e-6)


def test_an_overflow_of_one_rank_changes_no_parameter(overflow: Facts) -> None:
    assert overflow["errors"] == [None, None]
    assert overflow["unchanged_on_every_rank"]
    assert overflow["moved_by_a_clean_step"]


def test_the_schedule_holds_on_a_skip_and_goes_on_after_it(overflow: Facts) -> None:
    before, after, last = overflow["lr"]
    assert before == after < last


def test_a_skip_is_in_the_metrics_and_its_norm_is_not(overflow: Facts, role: str) -> None:
    clean, skipped, last = overflow["metrics"]
    names = ("loss_scale/min", "step_skipped", "skipped_total/max", "consecutive_skips/max")
    seen = [[metrics[f"{role}/fp16/{name}"] for name in names] for metrics in (clean, skipped, last)]
    # A critic's untrained head overflows at 65536, too.
    scale, before = 65536.0 / 2 ** seen[0][2][0], seen[0][2][0]
    assert seen[0] == [[scale], [0.0], [before], [0.0]]
    assert seen[1] == [[scale / 2], [1.0], [before + 1], [1.0]]
    assert seen[2] == [[scale / 2], [0.0], [before + 1], [0.0]]
    assert overflow["scales"] == [scale / 2]
    assert [f"{role}/grad_norm" in metrics for metrics in (clean, skipped, last)] == [True, False, True]


def test_the_sampler_gets_float16_that_scores_as_the_learner_does(workers: Callable[[str], Facts], layout: str) -> None:
    facts = workers("plan")[layout]["wire"]
    if facts is None:
        pytest.skip("verl 0.5.0 sends weights by a manager that needs the sampler")
    assert facts["dtypes"] == ["float16"]
    assert facts["log_prob_error"] < 5e-3


def test_a_resumed_run_goes_on_bit_for_bit(workers: Callable[[str], Facts], role: str) -> None:
    facts = workers("plan")["dp"]["resumed"]
    if facts is None:
        pytest.skip("before 0.7.1 checkpoints need another Megatron or mbridge than runs here, or TransformerEngine")
    assert facts[role]["errors"] == [None, None]
    assert facts[role]["saved"] == facts[role]["resumed"]
    assert facts[role]["saved"]["growth"] == 2
    first, second = facts[role]["norms"]
    assert first == second
    assert facts[role]["same"]
    assert facts[role]["same_next"]
