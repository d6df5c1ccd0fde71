"""What `fp16-patch run` puts on PYTHONPATH: Python imports it at start, and it activates when a framework is imported.

OpenRLHF has no plugins, verl before 0.9 has none, and the launching process nothing else that could import us. A
sitecustomize that this one shadows runs as it would have.
"""

import os
import sys
from pathlib import Path

FRAMEWORKS = ("openrlhf", "verl")


class _NoFramework:
    """A finder that refuses the frameworks: where we cannot be imported, they would train as they do without us.

    Other programs of that Python, tools that a run starts, are none of our business and go on.
    """

    def __init__(self, problem: ImportError) -> None:
        self._problem = problem

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in FRAMEWORKS:
            raise ImportError(
                f"{name} is not imported: fp16_patch cannot start in {sys.executable} ({self._problem}). "
                "Fix: install fp16-patch there, or set FP16_PATCH=off to train without it."
            )


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


def _activate_with_a_framework() -> None:
    from fp16_patch import wanted

    if wanted():
        import wrapt

        for framework in FRAMEWORKS:
            wrapt.register_post_import_hook(lambda module: __import__(f"fp16_patch.{module.__name__}"), framework)


try:
    _activate_with_a_framework()
except ImportError as problem:
    # `fp16-patch run` names the mode; where we are not there to read it, any other word than this means a mode.
    if os.environ.get("FP16_PATCH", "off") != "off":
        sys.meta_path.insert(0, _NoFramework(problem))  # type: ignore[arg-type]
_run_the_shadowed()
