"""The Python behind a command line: what would be asked, and where nobody can know it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fp16_patch.doctor.interpreters import interpreter_of

PPO = "verl.trainer.main_ppo"


@pytest.mark.parametrize(
    ("command", "python"),
    [
        (f"python3.11 -m {PPO} a=b", "python3.11"),
        ("/opt/env/bin/python -u train.py -I", "/opt/env/bin/python"),
        (f"python -I -m {PPO}", "python -I"),
        (f"python -uEB -W ignore -X dev -Sm {PPO}", "python -E -S"),
        ("python -Wignore -Is -c pass -E", "python -I -s"),
        (f"nohup nice -n 10 python -m {PPO}", "nohup-is-not-asked: python"),
        (f"srun -N2 --export ALL python -m {PPO}", "srun-is-not-asked: python"),
        (f"env -u X PYTHONPATH=/x python -s -m {PPO}", "env -u X PYTHONPATH=/x python -s"),
        (f"nohup env -i A=b nice python -m {PPO}", "env -i A=b python"),
        (f"conda run -n rl --no-capture-output python -m {PPO}", "conda run -n rl --no-capture-output python"),
        (f"uv run --with x torchrun --standalone -m {PPO}", "uv run --with x python"),
        (f"uv run --extra gpu -m {PPO}", "uv run --extra gpu python"),
        ("poetry run env A=b python train.py", "poetry run env A=b python"),
    ],
)
def test_a_python_is_found_with_what_decides_its_imports(command: str, python: str) -> None:
    assert interpreter_of(tuple(shlex.split(command))) == tuple(shlex.split(python.rpartition(": ")[2]))


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("#!/opt/env/bin/python3.11\nimport torch", "/opt/env/bin/python3.11"),
        ("#! /opt/env/bin/python -EI", "/opt/env/bin/python -E -I"),
        ("#!/usr/bin/env python3\n", "python3"),
        ("#!/usr/bin/env -S A=b python3 -I\n", "python3 -I"),
        ("#!/bin/sh\n'''exec' \"/a path/python3\" \"$0\" \"$@\"\n' '''\nimport sys", "'/a path/python3'"),
    ],
)
@pytest.mark.parametrize("front", ["", "nohup numactl -N 0 --"])
def test_the_first_line_of_a_script_is_read(text: str, python: str, front: str, tmp_path: Path) -> None:
    script = tmp_path / "launcher"
    script.write_text(text)
    script.chmod(0o755)
    assert interpreter_of((*front.split(), str(script), "--standalone")) == tuple(shlex.split(python))


@pytest.mark.parametrize(
    "text",
    ["", "\x7fELF", "#!/bin/bash\npython train.py", "#!", "#!/usr/bin/env", "#!'", "#!\xff", "#!/usr/bin/env uv"],
)
def test_a_script_of_another_kind_tells_none(text: str, tmp_path: Path) -> None:
    script = tmp_path / "launcher"
    script.write_text(text, encoding="latin-1")
    script.chmod(0o755)
    assert interpreter_of((str(script),)) is None


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash -c 'source env/bin/activate; python x.py'",
        "nohup ./no-such",
        "conda run -n rl train",
        "docker run x python",
    ],
)
def test_where_nobody_can_know_it_there_is_none(command: str) -> None:
    assert interpreter_of(tuple(shlex.split(command))) is None


def test_a_script_that_describes_its_own_python_is_not_asked_for_another(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import verl\n")
    assert interpreter_of(("uv", "run", str(script))) == ("uv", "run", "python")
    script.write_text('# /// script\n# dependencies = ["verl"]\n# ///\n')
    assert interpreter_of(("uv", "run", str(script))) is None
