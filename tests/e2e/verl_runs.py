"""Real runs of verl's command line, and what they leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from integration.cpu.arms import record_of
from integration.cpu.launch import RunResult

TIMEOUT_S = 900
STEPS = 2
FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))


def finished(result: RunResult) -> RunResult:
    assert result.ok, f"{result.reason}\n{result.tail(60)}"
    assert len(result.steps) == STEPS
    return result


def record(result: RunResult) -> Path:
    return record_of(result.log.parent)


def ledger(result: RunResult) -> dict[str, Any]:
    return dict(json.loads((record(result) / "ledger.json").read_text()))
