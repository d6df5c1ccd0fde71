"""`fp16-patch run`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import click

from fp16_patch import __version__
from fp16_patch.cli.group import Failure
from fp16_patch.cli.plan_of_command import plan_of

_PYTHON = re.compile(r"python[\d.]*")
_ANSWER_TIMEOUT_S = 60


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
    program = _program(training_command[0])
    if plan.active:
        _require_fp16_patch(program)
    propagation.carry(plan)
    if plan.active:
        # Unlike a plugin, a module listed here fails loudly when it cannot be imported.
        _append("VERL_USE_EXTERNAL_MODULES", "fp16_patch.autoload")
        _put_first("PYTHONPATH", str(Path(propagation.__file__).parent / "startup"))
    click.echo(_announcement(plan.mode, training_command), err=True)
    os.execvp(training_command[0], list(training_command))


def _program(name: str) -> str:
    import shutil

    path = shutil.which(name)
    if path is None and Path(name).is_file():
        raise Failure(f"{name}: not executable. Fix: chmod +x {name}, or `bash {name}`")
    if path is None:
        raise Failure(f"{name}: no such program. Fix: put the training command behind `--`")
    return path


def _require_fp16_patch(program: str) -> None:
    """Stop if the command's Python is another than ours and cannot import us: its processes would train as before."""
    if not _PYTHON.fullmatch(Path(program).name) or Path(program).absolute() == Path(sys.executable).absolute():
        return
    problem = import_problem(program)
    if problem is not None:
        fix = f"install fp16-patch there, or use {sys.executable}"
        raise Failure(f"{program} cannot import fp16_patch ({problem}). Fix: {fix}")


def import_problem(python: str) -> str | None:
    """Ask a Python whether it can import us: the error's last line if it cannot."""
    import subprocess

    question = [python, "-c", "import fp16_patch.runtime.activation"]
    try:
        asked = subprocess.run(question, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # nothing is known; the start-up in the process itself refuses where it has to
    return None if asked.returncode == 0 else (asked.stderr.strip().splitlines() or ["no reason given"])[-1]


def _announcement(mode: str, training_command: tuple[str, ...]) -> str:
    what = {
        "off": "off, nothing changes",
        "observe": "observe: dtypes stay as configured, the mismatch is measured",
    }.get(mode, f"{mode} in every role; the log says how many processes attest it before the first optimizer step")
    return f"fp16_patch {__version__}: {what}. Starting {shlex.join(training_command[:3])}"


def _put_first(variable: str, path: str) -> None:
    others = [other for other in os.environ.get(variable, "").split(os.pathsep) if other and other != path]
    os.environ[variable] = os.pathsep.join([path, *others])


def _append(variable: str, module: str) -> None:
    listed = [name for name in os.environ.get(variable, "").split(",") if name]
    os.environ[variable] = ",".join(dict.fromkeys([*listed, module]))
