"""verl in this process, on a CPU, with or without a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl")

import fp16_patch
from fp16_patch import Plan
from integration.cpu.warm.servers import IMPORTS
from tests.conftest import verl_environment
from tests.ranks import Facts, Ranks

LEARNER = Path(__file__).parent / "learner.py"
ON_A_CPU = (
    "compute_dtypes",
    "rope",
    "overflow_on_one_rank",
    "wire",
    "wire_after_clearance",
    "merged_lora_wire",
    "accumulation",
    "temperature",
)
WITH_A_SCALER = ("overflow_on_one_rank", "averaged_norm", "resume", "exports", "endless_overflow", "fused_chosen")
ALL = (*ON_A_CPU, *WITH_A_SCALER[1:], "resume_from_stock", "oracle")
# What an edited tree does to the bit: it has no step in two passes, whose kernel rounds otherwise.
AS_EDITED = ("oracle", "compute_dtypes", "rope", "temperature", "accumulation", "merged_lora_wire", "resume", "exports")
# As `fp16-patch run` does: verl knows plugins since 0.9 only.
MEASURED = {"FP16_PATCH": "1", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,fp16_patch.autoload"}
RETRY = {**MEASURED, "FP16_PATCH_INIT_SCALE": "65536"}
GROWING = {**RETRY, "FP16_PATCH_GROWTH_INTERVAL": "4", "FP16_PATCH_GRADIENT_LOOK_EVERY": "3"}
UNDER_A_PLAN = {**RETRY, "FP16_PATCH_ON_OVERFLOW": "skip"}
ARMS: Mapping[str, tuple[list[str], tuple[str, ...], Mapping[str, str]]] = {
    "stock": ([], ON_A_CPU, {}),
    "stock-with-scaler": (["--working-scaler"], WITH_A_SCALER, {}),
    "plan": ([], (*ALL, "lost"), UNDER_A_PLAN),
    "as-edited": ([], AS_EDITED, {**UNDER_A_PLAN, "FP16_PATCH_FUSED_STEP": "0"}),
    "retry": ([], ("retried", "first_scale", "lost", "infinite_loss", "alone", "kernels"), RETRY),
    "torchs-rule": ([], ("grown", "underflow"), {**GROWING, "FP16_PATCH_SCALE_RULE": "torch"}),
    "ahead": ([], ("grown",), {**GROWING, "FP16_PATCH_SCALE_RULE": "ahead"}),
    "measured": ([], ("first_scale",), MEASURED),
}
# VeOmni's engine trains no adapters, and its configuration names no kernel, no stored dtype and no scaler to mend.
OF_VEOMNI: Mapping[str, tuple[str, ...]] = {
    "stock": ("compute_dtypes", "overflow_on_one_rank", "wire", "temperature"),
    "plan": (
        *("compute_dtypes", "overflow_on_one_rank", "wire", "wire_after_clearance", "temperature", "averaged_norm"),
        *("resume", "exports", "endless_overflow", "resume_from_stock", "oracle", "lost", "vast_norm"),
        "several_optimizers",
    ),
    "retry": ("retried", "first_scale", "lost", "infinite_loss", "alone"),
    "measured": ("first_scale",),
}


@pytest.fixture
def activated() -> Callable[..., Plan]:
    """Activate a plan for the rest of the test."""

    def activate(**settings: Any) -> Plan:
        return fp16_patch.activate(Plan(**settings))

    return activate


@pytest.fixture
def compose() -> Callable[..., Any]:
    """The configuration verl's own command line composes from these overrides."""
    from hydra import compose, initialize_config_module

    def composed(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])

    return composed


@pytest.fixture(scope="session")
def learner(
    on_ranks: Ranks, tiny_model: Path, tiny_value_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Facts]:
    """Run scenarios of `learner.py` once for each arm, strategy and number of ranks; what they found."""
    known: dict[tuple[str, str, int], Facts] = {}

    def run(arm: str, strategy: str, ranks: int) -> Facts:
        if (arm, strategy, ranks) not in known:
            out = tmp_path_factory.mktemp(f"{arm}_{strategy}_{ranks}")
            options, scenarios, env = ARMS[arm]
            models = ["--model", str(tiny_model)]
            if strategy == "veomni":
                scenarios = OF_VEOMNI[arm]
                models += ["--value-model", str(tiny_value_model)]
            arguments = ["--strategy", strategy, *models, "--out", str(out), *options, *scenarios]
            facts = on_ranks.facts(LEARNER, arguments, ranks, out, verl_environment(env), IMPORTS)
            known[arm, strategy, ranks] = {"out": out, **facts}
        return known[arm, strategy, ranks]

    return run
