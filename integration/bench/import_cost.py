"""Measure what having fp16_patch installed costs a process that does not use it.

    python -m integration.bench.import_cost

Each repeat is a fresh interpreter that loads both entry points with FP16_PATCH unset, and one that loads nothing more
than an empty module in the same way; medians over the repeats.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from integration.bench.command import Bench

# As where verl or vLLM load a plugin: these are loaded, and Python has listed every folder of its path before.
PROBE = """
import sys, time, importlib, typing, multiprocessing
try:
    import no_such_module
except ImportError:
    pass
start = time.perf_counter()
{body}
print((time.perf_counter() - start) * 1e3)
assert "torch" not in sys.modules
"""
ARMS = {
    "both entry points": "import fp16_patch; fp16_patch.load; fp16_patch.load_in_vllm()",
    "an empty module": "import empty",
}


def milliseconds(body: str, folder: Path) -> float:
    """Time a body of code in a fresh interpreter, in milliseconds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    path = os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", PROBE.format(body=body)]
    return float(
        subprocess.run(command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True, check=True).stdout
    )


def measure(out: Path, _seed: int, repeats: int) -> dict[str, Any]:
    """Arm → `median_ms` and `fastest_ms` of so many fresh interpreters."""
    (out / "empty.py").touch()
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm, body in ARMS.items():
            times[arm].append(milliseconds(body, out))
    return {
        "repeats": repeats,
        "arms": {
            arm: {"median_ms": statistics.median(values), "fastest_ms": min(values)} for arm, values in times.items()
        },
    }


def show(measured: dict[str, Any], console: Console) -> None:
    for arm, found in measured["arms"].items():
        figures = f"median {found['median_ms']:.2f} ms, fastest {found['fastest_ms']:.2f} ms of {measured['repeats']}"
        console.print(f"{arm}: {figures}")


BENCH = Bench("import_cost", measure, show, full=25, smoke=1)

if __name__ == "__main__":
    BENCH.main(__doc__)
