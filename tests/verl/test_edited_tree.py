"""verl edited by our diff and run without us, beside verl as it is under a plan: the same dtypes and the same steps."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from integration.cpu.warm.servers import IMPORTS
from tests.conftest import verl_environment
from tests.edited import edited_copy
from tests.installed_release import verdict_on
from tests.ranks import Facts, Ranks
from tests.verl.conftest import AS_EDITED, LEARNER

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
if verdict_on("fsdp-scaler").exemption is not None:
    pytest.skip("the engine of this release is not the learner", allow_module_level=True)

ALL = (*AS_EDITED, "overflow_on_one_rank", "averaged_norm")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    edited_copy(("verl",), folder)
    return folder


@pytest.fixture(scope="module", params=["fsdp", "fsdp2"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def edited(
    strategy: str, tree: Path, on_ranks: Ranks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Facts:
    """Facts of the edited tree, on two ranks."""
    out = tmp_path_factory.mktemp(f"edited_{strategy}")
    arguments = ["--strategy", strategy, "--model", str(tiny_model), "--out", str(out), *ALL]
    environment = _before_all(tree, verl_environment())
    return on_ranks.facts(LEARNER, arguments, 2, out, environment, IMPORTS)


def _before_all(tree: Path, environment: Mapping[str, str]) -> dict[str, str]:
    # verl looks at every installed plugin otherwise, ours too, to find that nobody asked for it.
    without_plugins = {**environment, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    return {**without_plugins, "PYTHONPATH": f"{tree}{os.pathsep}{environment['PYTHONPATH']}"}


def test_every_role_computes_in_float16_and_those_that_train_have_a_scaler(edited: Facts) -> None:
    facts = edited["compute_dtypes"]
    assert {role: fact["dtypes"] for role, fact in facts.items()} == dict.fromkeys(facts, ["float16"])
    assert {role: fact["scaler"] for role, fact in facts.items()} == {"actor": True, "critic": True, "ref": False}


@pytest.mark.parametrize("scenario", AS_EDITED)
def test_it_does_what_the_patches_do(
    edited: Facts, learner: Callable[..., Facts], strategy: str, scenario: str
) -> None:
    plan = learner("as-edited", strategy, 2)
    edited["resume"]["path"] = plan["resume"]["path"]
    assert edited[scenario] == plan[scenario]


def test_an_overflow_on_one_rank_is_skipped_on_all_and_holds_the_schedule(edited: Facts) -> None:
    facts = edited["overflow_on_one_rank"]
    assert facts["scaler_enabled"]
    assert facts["unchanged_on_every_rank"]
    assert facts["moved_by_a_clean_step"]
    before, after, last = facts["lr"]
    assert before == after < last
    assert 0 < edited["averaged_norm"]["grad_norm"] < 1e3


def test_fp16_patch_is_not_loaded(tree: Path, warm_python: Path) -> None:
    program = "import sys, verl, verl.workers.engine_workers; print(verl.__file__, 'fp16_patch' in sys.modules)"
    env = _before_all(tree, verl_environment())
    shown = subprocess.run([warm_python, "-c", program], env=env, check=True, capture_output=True, text=True)
    assert shown.stdout.split()[-2:] == [str(tree / "verl/__init__.py"), "False"]
