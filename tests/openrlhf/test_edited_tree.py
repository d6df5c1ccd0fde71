"""OpenRLHF and DeepSpeed edited by our diff and run without us, beside both as they are under a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import openrlhf_environment
from tests.edited import edited_copy
from tests.installed_release import verdict_on

pytestmark = [pytest.mark.openrlhf, pytest.mark.e2e]
pytest.importorskip("openrlhf")
if not verdict_on("strategy-plan").variant.by_edit:
    pytest.skip("nobody has written the edits for this release", allow_module_level=True)

Facts = dict[str, Any]
LEARNER = Path(__file__).parent / "learner.py"
SCENARIOS = ("configuration", "overflow_on_one_rank", "resume")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    edited_copy(("openrlhf", "deepspeed"), folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(request: pytest.FixtureRequest, tree: Path, tiny_model: Path, tmp_path_factory: Any) -> Callable[..., Facts]:
    """Facts of both arms, on two ranks."""
    known: dict[str, Facts] = {}

    def run(arm: str) -> Facts:
        if arm not in known:
            out = tmp_path_factory.mktemp(f"{arm}_zero{request.param}")
            env = openrlhf_environment()
            if arm == "edited":
                env["PYTHONPATH"] = f"{tree}{os.pathsep}{env['PYTHONPATH']}"
                # Kernels whose sources lie elsewhere are compiled again: not in the place of the others.
                env["TORCH_EXTENSIONS_DIR"] = str(tree / "kernels")
            options = ["--zero-stage", str(request.param), "--model", str(tiny_model), "--out", str(out), *SCENARIOS]
            known[arm] = _facts(arm, options, env, out)
        return known[arm]

    return run


def _facts(arm: str, options: list[str], env: Mapping[str, str], out: Path) -> Facts:
    prefix = [str(Path(sys.executable).with_name("fp16-patch")), "run", "--"] if arm == "plan" else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(LEARNER)]
    with (out / "log.txt").open("w") as log:
        process = subprocess.run(
            [*prefix, *launch, *options], env=dict(env), stdout=log, stderr=subprocess.STDOUT, timeout=600, check=False
        )
    assert process.returncode == 0, (out / "log.txt").read_text()[-3000:]
    facts: Facts = json.loads((out / "facts.json").read_text())
    # The patches count steps; an edited tree does not.
    facts["resume"].pop("counted")
    return facts


def test_actor_and_critic_compute_in_float16(run: Callable[..., Facts]) -> None:
    for facts in run("edited")["configuration"].values():
        assert facts["parameters"] == facts["outputs"] == ["float16"]
        assert facts["rope"] == facts["accumulation"] == ["float32"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_does_what_the_patches_do(run: Callable[..., Facts], scenario: str) -> None:
    assert run("edited")[scenario] == run("plan")[scenario]
