"""verl's Megatron learner on gloo ranks, with and without a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from integration.cpu.launch import MEGATRON_ENVIRONMENT
from integration.cpu.warm.servers import IMPORTS
from tests.conftest import verl_environment
from tests.ranks import Facts, Ranks
from tests.verl.conftest import MEASURED

LEARNER = Path(__file__).parent / "learner.py"
LAYOUTS = ("dp", "tp", "pp", "ep")
STOCK = MEGATRON_ENVIRONMENT
FIRST = {**MEASURED, **STOCK, "VERL_USE_EXTERNAL_MODULES": f"{STOCK['VERL_USE_EXTERNAL_MODULES']},fp16_patch.autoload"}
RETRY = {**FIRST, "FP16_PATCH_INIT_SCALE": "65536"}
SKIP = {**RETRY, "FP16_PATCH_ON_OVERFLOW": "skip"}
GROWING = {**RETRY, "FP16_PATCH_GROWTH_INTERVAL": "4", "FP16_PATCH_GRADIENT_LOOK_EVERY": "3"}
# Arm → what is looked at in which layout of two ranks, and the environment.
ARMS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "stock": (
        {
            "dp": "built,overflow_on_one_rank,checked_gradients,overlapped,resumed",
            **dict.fromkeys(("tp", "pp", "ep"), "overflow_on_one_rank"),
        },
        STOCK,
    ),
    "skip": (
        {
            "dp": "built,overflow_on_one_rank,checked_gradients,overlapped",
            "tp": "built,overflow_on_one_rank,exported",
            "pp": "built,overflow_on_one_rank,endless_overflow",
            "ep": "built,overflow_on_one_rank,exported,resumed",
            "dp+offload": "overlapped",
            "vpp": "built,skipped",
            "cp": "built",
        },
        SKIP,
    ),
    "retry": ({**dict.fromkeys(LAYOUTS, "retried"), "pp": "retried,infinite_loss"}, RETRY),
    "measured": ({"pp": "first_scale", "ep": "first_scale,resumed_alone"}, FIRST),
    "torchs-rule": ({"pp": "grown"}, {**GROWING, "FP16_PATCH_SCALE_RULE": "torch"}),
    "ahead": ({"pp": "grown"}, GROWING),
}


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of four experts, whose heads and layers two ranks can share."""
    from integration.cpu.tiny_families import write_family

    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "norm_topk_prob": True}
    return write_family("qwen3_moe", tmp_path_factory.mktemp("tiny_mixture"), **sizes)


@pytest.fixture(scope="session")
def megatron_learner(
    on_ranks: Ranks, tiny_model: Path, tiny_mixture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Facts]:
    """Run scenarios of `learner.py` once for each arm, on two ranks: layout → scenario → what it found; and `log`."""
    known: dict[str, Facts] = {}

    def run(arm: str) -> Facts:
        if arm not in known:
            out = tmp_path_factory.mktemp(f"megatron_{arm}")
            cells, env = ARMS[arm]
            models = ["--model", str(tiny_model), "--mixture", str(tiny_mixture), "--out", str(out)]
            arguments = [*models, *(f"{layout}:{scenarios}" for layout, scenarios in cells.items())]
            facts = on_ranks.facts(LEARNER, arguments, 2, out, verl_environment(env), IMPORTS)
            known[arm] = {"log": (out / "log.txt").read_text(), **facts}
        return known[arm]

    return run
