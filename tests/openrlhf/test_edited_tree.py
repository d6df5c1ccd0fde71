"""OpenRLHF and DeepSpeed edited by our diff and run without us, beside both as they are under a plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import openrlhf_environment
from tests.edited import edited_copy
from tests.installed_release import verdict_on
from tests.ranks import Facts, Ranks

pytestmark = [pytest.mark.openrlhf, pytest.mark.e2e]
pytest.importorskip("openrlhf")
if not verdict_on("strategy-plan").variant.by_edit:
    pytest.skip("nobody has written the edits for this release", allow_module_level=True)

LEARNER, PRELOAD = Path(__file__).parent / "learner.py", "integration.cpu.warm.imports_of_openrlhf"
FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))
SCENARIOS = ("configuration", "overflow_on_one_rank", "resume")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    edited_copy(("openrlhf", "deepspeed"), folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(
    request: pytest.FixtureRequest,
    tree: Path,
    on_ranks: Ranks,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Facts]:
    """Facts of both arms, on two ranks."""
    known: dict[str, Facts] = {}

    def run(arm: str) -> Facts:
        if arm not in known:
            out = tmp_path_factory.mktemp(f"{arm}_zero{request.param}")
            env, prefix = openrlhf_environment(), [FP16_PATCH, "run", "--"]
            if arm == "edited":
                env["PYTHONPATH"] = f"{tree}{os.pathsep}{env['PYTHONPATH']}"
                prefix = []
            options = ["--zero-stage", str(request.param), "--model", str(tiny_model), "--out", str(out), *SCENARIOS]
            known[arm] = on_ranks.facts(LEARNER, options, 2, out, env, PRELOAD, prefix)
            # The patches count steps and look at what they read; an edited tree does neither.
            for fact in ("counted", "undamaged_everywhere"):
                known[arm]["resume"].pop(fact)
        return known[arm]

    return run


def test_actor_and_critic_compute_in_float16(run: Callable[..., Facts]) -> None:
    for facts in run("edited")["configuration"].values():
        assert facts["parameters"] == facts["outputs"] == ["float16"]
        assert facts["rope"] == facts["accumulation"] == ["float32"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_does_what_the_patches_do(run: Callable[..., Facts], scenario: str) -> None:
    assert run("edited")[scenario] == run("plan")[scenario]
