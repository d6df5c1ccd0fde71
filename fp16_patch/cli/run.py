"""`fp16-patch run`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from fp16_patch import __version__
from fp16_patch.cli.group import Failure
from fp16_patch.cli.plan_of_command import plan_of
from fp16_patch.untrusted.text import quoted

_ANSWER_TIMEOUT_S = 60
_NEVER_STARTS = "it does not run our sitecustomize, which PYTHONPATH names"
_QUESTION = f"""
import sys
if sys.version_info < (3, 10):
    sys.exit("it is Python %d.%d, older than 3.10" % sys.version_info[:2])
import fp16_patch.runtime.activation
if "fp16_patch_startup" not in sys.modules:
    sys.exit({_NEVER_STARTS!r})
"""


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option(
    "--mode", default=None, metavar="MODE", help="fp16, bf16, fp32, observe or off [default: FP16_PATCH, else fp16]."
)
@click.argument("training_command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND")
def command(mode: str | None, training_command: tuple[str, ...]) -> None:
    """Run a training command in FP16, in every process it starts.

    Every role gets one dtype, each process attests it before the first optimizer step, and the mismatch of sampler and
    learner is measured. Settings come from the environment, such as FP16_PATCH_INIT_SCALE=1024; `fp16-patch settings`
    lists them.

    \b
    Examples:
      fp16-patch run -- python -m verl.trainer.main_ppo …
      fp16-patch run -- python -m openrlhf.cli.train_ppo_ray …
      fp16-patch run --mode observe -- python -m verl.trainer.main_ppo …
    """
    from fp16_patch.doctor.launchers import program_of
    from fp16_patch.runtime import propagation

    plan = plan_of(mode)
    for problem in program_of(training_command).problems:
        raise Failure(problem)
    _require_program(training_command[0])
    startup = Path(propagation.__file__).parent / "startup"
    if plan.active:
        _require_fp16_patch(training_command, startup)
    propagation.carry(plan)
    if plan.active:
        # Unlike a plugin, a module listed here fails loudly when it cannot be imported.
        _append("VERL_USE_EXTERNAL_MODULES", "fp16_patch.autoload")
        os.environ["PYTHONPATH"] = _in_front(startup)
    click.echo(_announcement(plan.mode, training_command), err=True)
    os.execvp(training_command[0], list(training_command))


def _require_program(name: str) -> None:
    import shutil

    path = shutil.which(name)
    if path is None and Path(name).is_file():
        raise Failure(f"{name}: not executable. Fix: chmod +x {name}, or `bash {name}`")
    if path is None:
        raise Failure(f"{name}: no such program. Fix: put the training command behind `--`")


def _require_fp16_patch(command: tuple[str, ...], startup: Path) -> None:
    """Stop if the command's Python cannot start us: its processes would train as before.

    Where nobody can say which Python that is, the start-up in the process itself refuses.
    """
    from fp16_patch.doctor.interpreters import interpreter_of

    python = interpreter_of(command)
    if python is None or _is_this_python(python):
        return
    problem = import_problem(python, startup)
    if problem == _NEVER_STARTS:
        fix = "leave out options of Python such as -I, `env -i`, and a sitecustomize that comes before it"
        raise Failure(f"{shlex.join(python)} does not start fp16_patch ({problem}). Fix: {fix}")
    if problem is not None:
        fix = f"install fp16-patch there, or use {sys.executable}"
        raise Failure(f"{shlex.join(python)} cannot import fp16_patch ({problem}). Fix: {fix}")


def _is_this_python(python: tuple[str, ...]) -> bool:
    import shutil

    path = shutil.which(python[0])
    return len(python) == 1 and path is not None and Path(path).absolute() == Path(sys.executable).absolute()


def import_problem(python: tuple[str, ...], startup: Path) -> str | None:
    """Ask a Python whether it can import us, and starts with us: the error's last line if not.

    Args:
        python: the words that start it.
        startup: the folder that PYTHONPATH is to name.
    """
    import subprocess

    environment = {**os.environ, "PYTHONPATH": _in_front(startup), "FP16_PATCH": "off"}
    try:
        asked = subprocess.run(
            [*python, "-c", _QUESTION],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=_ANSWER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # nothing is known; the start-up in the process itself refuses where it has to
    return None if asked.returncode == 0 else quoted((asked.stderr.strip().splitlines() or ["no reason given"])[-1])


def _announcement(mode: str, training_command: tuple[str, ...]) -> str:
    what = {
        "off": "off, nothing changes",
        "observe": "observe: dtypes stay as configured, the mismatch is measured",
    }.get(mode, f"{mode} in every role; the log says how many processes attest it before the first optimizer step")
    return f"fp16_patch {__version__}: {what}. Starting {shlex.join(training_command[:3])}"


def _in_front(folder: Path) -> str:
    """Return PYTHONPATH with this folder first."""
    others = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != str(folder)]
    return os.pathsep.join([str(folder), *others])


def _append(variable: str, module: str) -> None:
    listed = [name for name in os.environ.get(variable, "").split(",") if name]
    os.environ[variable] = ",".join(dict.fromkeys([*listed, module]))
