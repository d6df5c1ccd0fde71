"""A command line is composed as hydra composes it for the program that is run, and one rejected override is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra")
pytestmark = pytest.mark.verl

import fp16_patch
from fp16_patch import Fp16PatchError, PlanError

PROGRAM = """
import hydra
from omegaconf import OmegaConf

@hydra.main(config_path="config", config_name="job", version_base=None)
def main(config):
    print(OmegaConf.to_yaml(config))

if __name__ == "__main__":
    main()
"""
FILES = {
    "app/main.py": PROGRAM,
    "app/config/job.yaml": "defaults: [optim: adam, _self_]\nwhere: config\nsteps: 1\nname: ???\n",
    "app/config/other.yaml": "where: other\n",
    "app/config/optim/adam.yaml": "lr: 1\n",
    "app/more/job.yaml": "where: more\n",
    "elsewhere/job.yaml": "where: elsewhere\n",
    "elsewhere/optim/sgd.yaml": "lr: 2\n",
    "shell/config/job.yaml": "where: the shell's\n",
    "shell/more/optim/muon.yaml": "lr: 3\n",
}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of its own folder, and a shell in another."""
    monkeypatch.setenv("FP16_PATCH", "off")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "shell")
    return tmp_path / "app" / "main.py"


@pytest.fixture
def compose(app: Path) -> Any:
    from fp16_patch.verl.config.command_line import composed

    fp16_patch.deactivate()
    return lambda *arguments: composed("app.main", arguments, app)


def rejected(compose: Any, *arguments: str) -> str:
    with pytest.raises(PlanError) as refusal:
        compose(*arguments)
    return str(refusal.value)


PATHS = [
    (),
    ("--config-path=config",),
    ("--config-path", "./more"),
    ("-cp", "../elsewhere"),
    ("-cn", "other"),
    ("--config-name=job.yaml", "steps=3"),
    ("--config-dir=../elsewhere", "optim=sgd"),
    ("-cd", "more", "optim=muon", "++new.key=[1,2]"),
    ("-cp", "../elsewhere", "-cn", "job"),
]


@pytest.mark.parametrize("arguments", PATHS, ids=" ".join)
def test_paths_and_names_mean_what_they_mean_to_hydra(arguments: tuple[str, ...], compose: Any, app: Path) -> None:
    from omegaconf import OmegaConf

    command = [sys.executable, str(app), *arguments, "hydra.run.dir=."]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FP16_PATCH": "off"}, check=True)
    assert OmegaConf.to_yaml(compose(*arguments)).strip() == run.stdout.strip()


def test_a_folder_that_is_not_here_is_named_with_where_it_was_looked_for(compose: Any, app: Path) -> None:
    said = rejected(compose, "--config-path=nothing")
    assert said.startswith(f"--config-path=nothing: there is no folder {app.parent}/nothing on this machine")
    assert f"a relative path starts from {app.parent}; --config-dir takes one of the shell's" in said
    assert "ask where the run will start" in rejected(compose, "-cp", "/no/such/folder")
    assert rejected(compose, "--config-dir=nothing").startswith("--config-dir=nothing: there is no folder ")
    assert "Cannot find primary config 'none'" in rejected(compose, "--config-name=none").splitlines()[0]


MANY = [f"+filler.key{number}={number}" for number in range(12)]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stepz=3",
            "stepz=3: verl's configuration has no such key in this release. Fix: did you mean steps? Else leave",
        ),
        (
            "optim.lrr=3",
            "optim.lrr=3: verl's configuration has no such key in this release. Fix: did you mean optim.lr?",
        ),
        ("zzz=3", "zzz=3: verl's configuration has no such key in this release. Fix: leave it out; +zzz=3 adds a key"),
        ("+steps=3", "+steps=3: verl's configuration has this key already. Fix: leave the + out: steps=3"),
        (
            "steps=1,2",
            "steps=1,2: hydra takes the comma for a sweep. Fix: quote the value, or write a list: steps=[1,2]",
        ),
        ("name=<path>", "name=<path>: hydra cannot read the value. Fix: quote it for hydra as well as for the shell"),
        ("name=[1,", "name=[1,: hydra cannot read the value"),
        ("name=a=b", "name=a=b: hydra cannot read the value"),
        (
            "optim=sgd",
            "optim=sgd: In 'job': Could not find 'optim/sgd'; Available options in 'optim':; adam. Fix: use one",
        ),
        (" ", "command=' ': hydra takes key=value only"),
    ],
)
@pytest.mark.parametrize("at", [0, 5, 12])
def test_the_one_override_that_hydra_rejects_comes_first_and_alone(
    override: str, said: str, at: int, compose: Any
) -> None:
    message = rejected(compose, *MANY[:at], override, *MANY[at:])
    assert message.startswith(said)
    assert len(message.splitlines()) == 1
    assert "filler" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg=job"], "command=--cfg: it prints, and trains nothing"),
        (["--multirun"], "command=--multirun: a sweep is several runs"),
        (["--no-such-flag", *MANY], "command=--no-such-flag: hydra has no such option. Fix: leave it out"),
        ([*MANY, "-cn"], "command=--config-name/-cn: hydra says: argument --config-name/-cn: expected one argument"),
        ([*MANY, "-cn", "job", "steps=2"], "command=steps=2: hydra reads no overrides behind an option"),
    ],
)
def test_an_option_that_hydra_does_not_take_is_named_alone(arguments: list[str], said: str, compose: Any) -> None:
    message = rejected(compose, *arguments)
    assert message.startswith(said)
    assert "filler" not in message


def test_the_first_of_several_is_named(compose: Any) -> None:
    assert rejected(compose, *MANY, "steps=2", "one=1", "two=2").startswith("one=1: ")


def test_a_configuration_that_hydra_rejects_by_itself_is_not_blamed_on_an_override(compose: Any, app: Path) -> None:
    (app.parent / "config" / "job.yaml").write_text("defaults: [nothing: here]\n")
    assert rejected(compose, "steps=2").startswith("--config-name=")


def test_a_script_that_is_not_here_is_the_installed_programs(compose: Any, app: Path) -> None:
    from fp16_patch.verl.config.command_line import composed

    config = composed("verl.trainer.main_ppo", ["actor_rollout_ref.rollout.n=7"], app.parent / "main_ppo.py")
    assert config.actor_rollout_ref.rollout.n == 7
    with pytest.raises(PlanError, match=r"command=verl\.trainer\.main_none: the installed verl has no such program"):
        composed("verl.trainer.main_none", [])


def test_nothing_heavy_is_imported_for_a_command_line() -> None:
    program = """
import sys
from fp16_patch.doctor import examine
from fp16_patch.plan.plan import Plan
found = examine(Plan(), "python -m verl.trainer.main_ppo actor_rollout_ref.rollout.name=vllm".split())
assert found.roles, found.problems
print([name for name in ("torch", "ray", "vllm", "verl", "transformers") if name in sys.modules])
"""
    root = str(Path(fp16_patch.__file__).parents[1])
    env = {"FP16_PATCH": "off", "PYTHONPATH": root, "PATH": "/usr/bin:/bin"}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-path", "a\0b"], "--config-path=a\\x00b: a path holds no NUL character"),
        (["--config-dir", "a\0b"], "--config-dir=a\\x00b: a path holds no NUL character"),
        (["--config-path", "n" * 5000], "file name too long"),
        (["--config-dir", "n" * 5000], "file name too long"),
        (["--config-name", "n" * 5000], "File name too long"),
        (["--config-path", "pkg://no.such"], "Fix: "),
        (["--config-path", "pkg://"], "Fix: "),
        (["--version"], "--version: it prints, and trains nothing"),
        (["a[.b=1"], "a[.b=1"),
        (["steps=" + "[" * 300], "hydra cannot read the value"),
        (["optim=a\0b"], "optim=a\\x00b"),
        (["\x1b]0;title\x07=1"], r"\x1b]0;title\x07=1"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_any_argument_is_refused_in_a_sentence(arguments: list[str], said: str, compose: Any) -> None:
    message = rejected(compose, *arguments)
    assert said in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "content",
    [b"a: [1, ", b"a: \xff\xfe", b"a: " + b"[" * 3000, b"5\n", b"a: !!python/object:os.x {}\n"],
    ids=lambda content: repr(content)[:30],
)
def test_a_damaged_configuration_is_a_sentence(content: bytes, compose: Any, app: Path) -> None:
    (app.parent / "config" / "job.yaml").write_bytes(content)
    message = rejected(compose, "+steps=1")
    assert "Fix: " in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"def main(:\n", "not read as Python: invalid syntax"),
        (b"x = 1\0\n", "not read as Python"),
        ("# größer\n".encode("latin-1"), "not read as Python"),
        (PROGRAM.replace('"config"', "WHERE").encode(), "@hydra.main(config_path)=WHERE: "),
    ],
)
def test_a_program_that_cannot_be_read_is_named(program: bytes, said: str, compose: Any, app: Path) -> None:
    app.write_bytes(program)
    with pytest.raises(Fp16PatchError) as refusal:
        compose()
    assert str(app) in str(refusal.value)
    assert said in str(refusal.value)


def test_a_program_with_a_declared_encoding_is_read(compose: Any, app: Path) -> None:
    app.write_bytes(f"# coding: latin-1\n# größer\n{PROGRAM}".encode("latin-1"))
    assert compose("name=a").where == "config"
