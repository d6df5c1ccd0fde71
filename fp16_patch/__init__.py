"""One FP16 dtype in every process of an RL run, proved and measured.

Importing this package is free: nothing heavy is loaded before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fp16_patch.activation import activate, deactivate
    from fp16_patch.errors import Fp16PatchError, LossScaleCollapse, PatchError, PlanError, PrecisionError
    from fp16_patch.plan import Plan

_HOME = {
    "activate": "fp16_patch.activation",
    "deactivate": "fp16_patch.activation",
    "Plan": "fp16_patch.plan",
    "Fp16PatchError": "fp16_patch.errors",
    "LossScaleCollapse": "fp16_patch.errors",
    "PatchError": "fp16_patch.errors",
    "PlanError": "fp16_patch.errors",
    "PrecisionError": "fp16_patch.errors",
}

__all__ = [
    "Fp16PatchError",
    "LossScaleCollapse",
    "PatchError",
    "Plan",
    "PlanError",
    "PrecisionError",
    "__version__",
    "activate",
    "deactivate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
