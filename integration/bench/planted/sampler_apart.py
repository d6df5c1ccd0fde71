"""Start the sampler in another dtype than the plan's, and judge it by that one: for an ablation, which mixes the two.

verl imports this in every process (`VERL_USE_EXTERNAL_MODULES`), before it loads our plugin. `BENCH_SAMPLER` names the
sampler's mode, as `FP16_PATCH` does the learner's. The ledger is as strict as ever: learner and sampler are judged by a
plan each, in every process. Without this module no run of fp16_patch trains such a pair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    """Return the plan as it is decided for the sampler."""
    return replace(plan, mode=os.environ[SAMPLER_ENV])


def start_apart(settings: ModuleType) -> None:
    """Start vLLM in the sampler's dtype, and have verl's configuration say so."""
    planned, applied = settings.rollout_config, settings.apply_to

    def rollout_config(wrapped: Any, rollout: Any, args: Any, kwargs: Any) -> None:
        planned(wrapped, rollout, args, kwargs)
        plan = settings.current_plan()
        if plan.overrides_dtype:
            settings.force(rollout, dtype=sampler_plan(plan).dtype)

    def apply_to(config: Any, plan: Any) -> list[str]:
        from omegaconf import OmegaConf

        changed: list[str] = applied(config, plan)
        OmegaConf.update(config, "actor_rollout_ref.rollout.dtype", sampler_plan(plan).dtype, force_add=True)
        return changed

    settings.rollout_config, settings.apply_to = rollout_config, apply_to


def judge_apart(ledger: ModuleType) -> None:
    """Judge the sampler's dtypes by its plan, and everything else by the run's."""
    judged = ledger.judge

    def judge(records: Sequence[Any], plan: Any, *arguments: Any, **named: Any) -> list[Any]:
        own, seen = sampler_plan(plan), ledger.merged(records).get(ROLE, {})
        found = judged(records, plan, *arguments, **named)
        # By its own plan alone; attestation and whatever else is required of it have been judged above.
        sampler = [
            {**record, "mode": own.mode, "problem": None, "roles": {ROLE: record["roles"][ROLE]}}
            for record in records
            if ROLE in record["roles"]
        ]
        others = [finding for finding in found if finding.role != ROLE or finding.quantity not in seen]
        return [*others, *judged(sampler, own, {})]

    ledger.judge = judge


if SAMPLER_ENV in os.environ:
    install()
