"""verl's SFT trainer from its own command line, on gloo ranks, with and without a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import verl_environment
from tests.ranks import RANKS, Facts, Ranks

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")

from fp16_patch.verl.config.settings import has_legacy_workers
from integration.cpu.warm.servers import IMPORTS
from tests.verl.sft_settings import STEPS, TOO_HIGH, settings, write_conversations

if has_legacy_workers():
    pytest.skip("the engine of this release is refused", allow_module_level=True)

PROGRAM = Path(__file__).with_name("sft.py")
# As `fp16-patch run` does: verl knows plugins since 0.9 only.
PLAN = {
    "FP16_PATCH": "1",
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,fp16_patch.autoload",
    "FP16_PATCH_INIT_SCALE": str(TOO_HIGH),
}
ARMS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "stock": ((), {}),
    "plan": ((), PLAN),
    "skip": ((), {**PLAN, "FP16_PATCH_ON_OVERFLOW": "skip"}),
    "refused": (("engine.qat.enable=True", "model.use_fused_kernels=True"), PLAN),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="module")
def sft(
    on_ranks: Ranks, tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Facts]:
    """Run the trainer once for each arm, strategy and number of ranks: what was seen, logged and said."""
    known: dict[tuple[str, str, int], Facts] = {}

    def run(arm: str, strategy: str = "fsdp", ranks: int = 2) -> Facts:
        if (arm, strategy, ranks) not in known:
            out = tmp_path_factory.mktemp(f"sft_{arm}_{strategy}_{ranks}")
            overrides, env = ARMS[arm]
            metrics = out / "metrics.jsonl"
            environment = verl_environment({**env, "VERL_FILE_LOGGER_PATH": str(metrics)})
            arguments = [str(out), *settings(tiny_model, dataset, out, strategy), *overrides]
            facts = on_ranks.facts(PROGRAM, arguments, ranks, out, environment, IMPORTS)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            steps = [json.loads(line)["data"] for line in lines]
            known[arm, strategy, ranks] = {**facts, "steps": steps, "log": (out / "log.txt").read_text()}
        return known[arm, strategy, ranks]

    return run


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def column(facts: Facts, name: str) -> list[Any]:
    return [step.get(name) for step in facts["steps"]]


def test_stock_computes_in_bfloat16_whatever_the_documented_key_says(sft: Callable[..., Facts]) -> None:
    facts = sft("stock")
    assert facts["error"] is None
    assert facts["activation"] == ["bfloat16"]
    assert len(facts["steps"]) == STEPS
    assert not [name for step in facts["steps"] for name in step if name.startswith("fp16/")]


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("fsdp2", marks=pytest.mark.matrix)])
def test_the_model_computes_in_float16_and_its_masters_are_float32(
    sft: Callable[..., Facts], strategy: str, ranks: int
) -> None:
    facts = sft("plan", strategy, ranks)
    assert facts["error"] is None
    assert (facts["activation"], facts["master"], facts["gradient"]) == (["float16"], ["float32"], ["float32"])


def test_each_rank_judges_itself_before_its_first_step_and_the_first_one_says_so(
    sft: Callable[..., Facts], ranks: int
) -> None:
    lines = [line for line in sft("plan", ranks=ranks)["log"].splitlines() if "attests mode fp16" in line]
    assert len(lines) == 1
    for seen in ("autocast=float16", "parameter=float16", "activation=float16", "gradient=float32", "master=float32"):
        assert seen in lines[0]


def test_an_overflow_at_a_huge_scale_is_tried_again_and_logged_as_numbers(
    sft: Callable[..., Facts], ranks: int
) -> None:
    facts = sft("plan", ranks=ranks)
    assert column(facts, "fp16/step_skipped") == [0.0] * STEPS
    first, *later = column(facts, "fp16/retries")
    assert first > 0
    assert later == [0.0] * (STEPS - 1)
    assert column(facts, "fp16/loss_scale") == [TOO_HIGH / 2**first] * STEPS
    assert all(norm > 0 for norm in column(facts, "train/grad_norm"))


def test_a_skipped_step_has_no_norm_and_holds_the_schedule(sft: Callable[..., Facts]) -> None:
    facts = sft("skip")
    assert facts["error"] is None
    skipped, norms, lr = (column(facts, name) for name in ("fp16/step_skipped", "train/grad_norm", "train/lr"))
    assert skipped[0] == 1.0
    assert [norm is None for norm in norms] == [skip == 1.0 for skip in skipped]
    assert column(facts, "fp16/skipped_total") == [sum(skipped[: step + 1]) for step in range(STEPS)]
    taken = sft("plan")
    assert lr[0] < column(taken, "train/lr")[0]


def test_what_cannot_be_float16_is_refused_by_name_before_a_process_group_is_made(sft: Callable[..., Facts]) -> None:
    facts = sft("refused", ranks=1)
    assert facts["error"].startswith("PlanError: engine.qat.enable=True: ")
    assert "\nmodel.use_fused_kernels=True: " in facts["error"]
    assert not facts["began"]
    assert facts["activation"] == facts["steps"] == []
