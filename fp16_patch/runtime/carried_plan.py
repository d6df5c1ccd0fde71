"""Carries a plan inside an object that a framework pickles, and activates it wherever the object arrives."""

from __future__ import annotations

import os

from fp16_patch.plan.plan import PLAN_ENV, TOLD_ENV, Plan
from fp16_patch.runtime.activation import activate


class CarriedPlan:
    """Goes into what a framework sends to its workers; unpickling it raises what `activate` raises."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return _arrive, (self.plan.to_json(), os.environ.get(TOLD_ENV, "{}"))


def _arrive(plan: str, told: str) -> CarriedPlan:
    # As if it had come by the environment: a process may have been told another plan.
    return CarriedPlan(activate(Plan.from_environment({**os.environ, PLAN_ENV: plan, TOLD_ENV: told})))
