"""Activates once a framework is imported; where that cannot be, refuses the frameworks.

Our `sitecustomize` imports it in every Python that a run starts, whichever that is and whatever it lacks. So it needs
nothing but the standard library, and Python 3.6 can read it.
"""

import os
import sys

FRAMEWORKS = ("openrlhf", "verl")
OLDEST = (3, 10)


class NoFramework:
    """A finder that refuses the frameworks: where we cannot start, they would train as they do without us.

    Other programs of that Python, tools that a run starts, are none of our business and go on.
    """

    def __init__(self, problem):
        self.problem = problem

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FRAMEWORKS:
            raise ImportError(
                f"{name} is not imported: fp16_patch cannot start in {sys.executable} ({self.problem}). "
                "Fix: install fp16-patch there, or set FP16_PATCH=off to train without it."
            )


def wanted():
    """Return whether the environment names a mode other than `off`, as `fp16_patch.wanted` does."""
    return os.environ.get("FP16_PATCH", "off").strip().lower() not in ("", "0", "off", "false", "no")


def carried():
    """Return whether a process above has left a plan here. Where `off` is said against it, that is told."""
    return "FP16_PATCH_PLAN" in os.environ


def refuse(problem):
    """Refuse the frameworks in this process from now on, unless the plan's own refusal does so already."""
    activation = sys.modules.get("fp16_patch.runtime.activation")
    if activation is None or activation.refusal() is None:
        said = problem if isinstance(problem, ImportError) else f"{type(problem).__name__}: {problem}"
        sys.meta_path.insert(0, NoFramework(said))


def start():
    """Wait for a framework's import. Whatever fails here ends in a refusal: Python goes on after `sitecustomize`."""
    if not (wanted() or carried()):
        return
    try:
        _wait_for_a_framework()
    except Exception as problem:
        if wanted():
            refuse(problem)


def _wait_for_a_framework():
    if sys.version_info < OLDEST:
        raise ImportError("it is Python {}.{}, older than 3.10".format(*sys.version_info))
    import wrapt

    import fp16_patch  # noqa: F401

    for framework in FRAMEWORKS:
        wrapt.register_post_import_hook(_activate, framework)


def _activate(module):
    try:
        __import__(f"fp16_patch.{module.__name__}")
    except Exception as problem:
        if wanted():
            # The hook is spent: whoever imports the framework again would have it without us.
            refuse(problem)
            raise
