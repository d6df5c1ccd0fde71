"""Each program of the frameworks has a verdict by its name, however that is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp16_patch.doctor import mains
from fp16_patch.doctor.launchers import Program
from fp16_patch.doctor.mains import MAINS, dotted_name, main_of
from fp16_patch.patching.sources import installed_file

ASYNC = "verl.experimental.fully_async_policy.fully_async_main"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("verl/trainer/main_ppo.py", "verl.trainer.main_ppo"),
        ("/home/verl/verl/trainer/main_ppo.py", "verl.trainer.main_ppo"),
        ("../verl/experimental/one_step_off_policy/main_ppo.py", "verl.experimental.one_step_off_policy.main_ppo"),
        ("/code/verl/recipe/dapo/main_dapo.py", "recipe.dapo.main_dapo"),
        ("OpenRLHF/openrlhf/cli/train_ppo_ray.py", "openrlhf.cli.train_ppo_ray"),
        ("/data/examples/data_preprocess/gsm8k.py", "examples.data_preprocess.gsm8k"),
    ],
)
def test_a_scripts_path_names_the_same_program_as_its_module(path: str, name: str) -> None:
    assert dotted_name(Program(path)) == name
    assert main_of(Program(path)) == main_of(Program(name, is_module=True))
    assert main_of(Program(path)) is not None


def test_a_script_of_a_name_that_two_programs_have_is_not_guessed() -> None:
    assert main_of(Program("main_ppo.py")) is None
    assert main_of(Program("fully_async_main.py")) is None
    assert main_of(Program("main_ppo_split.py")) == MAINS["examples.split_placement.main_ppo_split"]
    assert main_of(Program("train.py")) is None
    assert main_of(Program()) is None


@pytest.mark.parametrize(
    "name",
    [
        *("verl.trainer.main_ppo", ASYNC, "verl.trainer.sft_trainer", "verl.trainer.sft_trainer_ray"),
        *("openrlhf.cli.train_ppo_ray", "openrlhf.cli.train_sft"),
    ],
)
def test_what_is_known_is_examined(name: str) -> None:
    assert MAINS[name].conflict(Program(name, is_module=True)) is None


@pytest.mark.parametrize(
    ("name", "reason", "fix"),
    [
        ("recipe.fully_async_policy.fully_async_main", "its trainer is none that fp16_patch knows", f"use {ASYNC}"),
        ("verl.trainer.main_ppo_sync", "its trainer is a part of the program itself", "use verl.trainer.main_ppo"),
        ("verl.trainer.main_ppo_v0", "starts nothing by itself", "trainer.use_v1=False"),
        (
            "verl.trainer.fsdp_sft_trainer",
            "computes in bfloat16 under autocast",
            "use verl.trainer.sft_trainer of verl",
        ),
        ("verl.trainer.main_generation_server", "trains nothing", "without `fp16-patch run`"),
        ("recipe.dapo.main_dapo", "its trainer is none that fp16_patch knows", "algorithm.filter_groups"),
        ("recipe.prime.main_prime", "its trainer is none that fp16_patch knows", "use verl.trainer.main_ppo"),
        ("openrlhf.cli.batch_inference", "trains nothing", "without `fp16-patch run`"),
        ("openrlhf.cli.train_kto", "never run under a plan", "use train_sft, train_dpo or train_rm"),
    ],
)
def test_what_is_refused_is_named_with_what_to_use_instead(name: str, reason: str, fix: str) -> None:
    program = Program(name, is_module=True)
    main = main_of(program)
    assert main is not None
    conflict = main.conflict(program)
    assert str(conflict).startswith(f"command={name}: ")
    assert reason in str(conflict)
    assert fix in str(conflict).partition("Fix: ")[2]


@pytest.mark.parametrize("framework", ["verl", "openrlhf"])
def test_every_program_of_the_installed_release_is_in_the_table(framework: str) -> None:
    package = installed_file(framework)
    if package is None:
        pytest.skip(f"{framework} is not installed")
    root = package.parent
    folders = {"verl": ("trainer", "experimental/*", "model_merger"), "openrlhf": ("cli",)}[framework]
    files = [file for folder in folders for file in root.glob(f"{folder}/*.py")]
    programs = [file for file in files if 'if __name__ == "__main__":' in file.read_text()]
    assert len(programs) > 3
    for file in programs:
        name = ".".join((framework, *file.relative_to(root).with_suffix("").parts)).removesuffix(".__main__")
        assert name in MAINS, name


def test_the_page_names_every_program() -> None:
    page = (Path(mains.__file__).parent / "README.md").read_text(encoding="utf-8")
    again = ("recipe.fully_async_policy.fully_async_main", "recipe.one_step_off_policy.main_ppo")  # as in experimental
    assert [name for name in MAINS if f"`{name}`" not in page and name not in again] == []
