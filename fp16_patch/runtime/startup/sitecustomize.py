"""What `fp16-patch run` puts on PYTHONPATH: Python imports it at start, and it activates when a framework is imported.

OpenRLHF has no plugins, verl before 0.9 has none, and the launching process nothing else that could import us. A
sitecustomize that this one shadows runs as it would have.
"""

import sys
from pathlib import Path

import fp16_patch_startup


def _run_the_shadowed() -> None:
    here = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if Path(path).resolve() != here]
    ours, sys.path[:] = sys.modules.pop(__name__, None), elsewhere
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as missing:
        if missing.name != "sitecustomize":
            raise
        sys.modules[__name__] = ours  # type: ignore[assignment]


fp16_patch_startup.start()
_run_the_shadowed()
