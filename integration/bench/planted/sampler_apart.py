"""A sampler in another dtype than the plan's, and a ledger that wants it so: for an ablation, which must mix the two.

verl imports this in every process (`VERL_USE_EXTERNAL_MODULES`), before it loads our plugin. `BENCH_SAMPLER` names the
sampler's mode, as `FP16_PATCH` does the learner's. The ledger is as strict as ever: learner and sampler are judged by a
plan each, in every process. Without this module no run of fp16_patch trains such a pair.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType
from typing import Any

import wrapt

SAMPLER_ENV = "BENCH_SAMPLER"
ROLE = "rollout"


def install() -> None:
    # Where our hooks are defined, not where they are applied: before the first of them is looked up.
    wrapt.register_post_import_hook(start_apart, "fp16_patch.verl.config.settings")
    wrapt.register_post_import_hook(judge_apart, "fp16_patch.runtime.ledger")


def sampler_plan(plan: Any) -> Any:
    """The plan, decided for the sampler."""
    return replace(plan, mode=os.environ[SAMPLER_ENV])


def start_apart(config: ModuleType) -> None:
    """vLLM is started in the sampler's dtype, and verl's configuration says so."""
    planned, forced = config.rollout_config, config._forced_keys

    def rollout_config(wrapped: Any, rollout: Any, args: Any, kwargs: Any) -> None:
        planned(wrapped, rollout, args, kwargs)
        if config.current_plan().overrides_dtype:
            config.force(rollout, dtype=sampler_plan(config.current_plan()).dtype)

    def forced_keys(settings: Any, plan: Any) -> dict[str, Any]:
        return {**forced(settings, plan), f"{config.ROLLOUT}.dtype": sampler_plan(plan).dtype}

    config.rollout_config, config._forced_keys = rollout_config, forced_keys


def judge_apart(ledger: ModuleType) -> None:
    """The sampler's dtypes are judged by its plan, all others by the run's."""
    judged = ledger._dtype_findings

    def dtype_findings(record: dict[str, Any], plan: Any) -> list[Any]:
        learner = {role: row for role, row in record["roles"].items() if role != ROLE}
        sampler = {role: row for role, row in record["roles"].items() if role == ROLE}
        return [
            *judged({**record, "roles": learner}, plan),
            *judged({**record, "roles": sampler}, sampler_plan(plan)),
        ]

    ledger._dtype_findings = dtype_findings


if SAMPLER_ENV in os.environ:
    install()
