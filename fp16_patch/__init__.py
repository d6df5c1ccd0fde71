"""One FP16 dtype in every process of an RL run, proved and measured.

Importing this package is free: nothing heavy is loaded before it is needed. The `verl.plugins` and
`vllm.general_plugins` entry points name attributes of this file, because both frameworks load them in every process
they start, also for users who never asked for us: with `FP16_PATCH` unset this file is all they cost.
"""

import os
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
_ENTRY_POINTS = ("load", "load_in_vllm")

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


def _nothing() -> None:
    """Stand in for an entry point when nobody asked for us."""


def __getattr__(name: str) -> Any:
    if name in _ENTRY_POINTS:
        # Looking one up is enough to activate, where asked to: verl does not call what it finds.
        return getattr(import_module("fp16_patch.autoload"), name) if wanted() else _nothing
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
