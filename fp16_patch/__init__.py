"""One FP16 dtype in every process of an RL run, proved and measured.

Importing this package is free: nothing heavy is loaded before it is needed. The `verl.plugins` and
`vllm.general_plugins` entry points name attributes of this file, because both frameworks load them in every process
they start, also for users who never asked for us: with `FP16_PATCH` unset this file is all they cost.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fp16_patch.plan.errors import (
        Fp16PatchError,
        LossScaleCollapse,
        MismatchAlert,
        PatchError,
        PlanError,
        PrecisionError,
    )
    from fp16_patch.plan.plan import Plan
    from fp16_patch.runtime.activation import activate, deactivate

_HOME = {
    "activate": "fp16_patch.runtime.activation",
    "deactivate": "fp16_patch.runtime.activation",
    "Plan": "fp16_patch.plan.plan",
    "Fp16PatchError": "fp16_patch.plan.errors",
    "LossScaleCollapse": "fp16_patch.plan.errors",
    "MismatchAlert": "fp16_patch.plan.errors",
    "PatchError": "fp16_patch.plan.errors",
    "PlanError": "fp16_patch.plan.errors",
    "PrecisionError": "fp16_patch.plan.errors",
}
_ENTRY_POINTS = ("load", "load_in_vllm", "load_in_sglang")

__all__ = [
    "Fp16PatchError",
    "LossScaleCollapse",
    "MismatchAlert",
    "PatchError",
    "Plan",
    "PlanError",
    "PrecisionError",
    "__version__",
    "activate",
    "deactivate",
]


def wanted() -> bool:
    """Return whether the environment names a mode other than `off`."""
    return os.environ.get("FP16_PATCH", "off").strip().lower() not in ("", "0", "off", "false", "no")


def concerned() -> bool:
    """Return whether this process is to compute under a plan, or has said `off` to one that was carried to it."""
    return wanted() or "FP16_PATCH_PLAN" in os.environ


def _nothing() -> None:
    """Stand in for an entry point when nobody asked for us."""


def _entry_point(name: str) -> Callable[[], None]:
    """Look one up, which activates: verl does not call what it finds.

    Both frameworks go on after an exception here, so a refusal is repeated where they do not: where verl imports what
    it trains with, and where vLLM calls what it has found.
    """
    try:
        found: Callable[[], None] = getattr(import_module("fp16_patch.autoload"), name)
        return found
    except Exception as problem:
        if not wanted():
            return _nothing
        import_module("fp16_patch.runtime.startup.fp16_patch_startup").refuse(problem)
        if name == "load":
            raise
        return _refusal(problem)


def _refusal(problem: Exception) -> Callable[[], None]:
    def refuse() -> None:
        raise RuntimeError(
            f"fp16_patch cannot start in a process of vLLM ({type(problem).__name__}: {problem}), which would compute "
            "as it does without. Fix: mend the cause, or set FP16_PATCH=off to train without fp16_patch"
        ) from problem

    return refuse


def __getattr__(name: str) -> Any:
    if name in _ENTRY_POINTS:
        return _entry_point(name) if concerned() else _nothing
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
