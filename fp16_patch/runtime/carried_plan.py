"""Carries a plan inside an object that a framework pickles, and activates it wherever the object arrives."""

from __future__ import annotations

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import activate


class CarriedPlan:
    """Goes into what a framework sends to its workers; unpickling it raises what `activate` raises."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _arrive, (self.plan.to_json(),)


def _arrive(plan: str) -> CarriedPlan:
    return CarriedPlan(activate(Plan.from_json(plan)))
