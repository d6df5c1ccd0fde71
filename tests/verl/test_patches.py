"""verl's patches: wrapped once in every order, and only code that they know."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fp16_patch
from fp16_patch import PatchError, Plan
from fp16_patch.patching.declarations import Patch, installed_release
from tests.conftest import verl_environment

pytestmark = pytest.mark.verl

RELEASE = str(installed_release("verl"))
IMPORT = "import verl.workers.engine.fsdp.transformer_impl as m"
ACTIVATE = "import fp16_patch; fp16_patch.activate()"
ORDERS = {
    "activate, then import": f"{ACTIVATE}; {IMPORT}",
    "import, then activate": f"{IMPORT}; {ACTIVATE}",
    "import fp16_patch.verl": f"import fp16_patch.verl; {IMPORT}",
    "the entry point": IMPORT,
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_import_and_activation_wraps_once(order: str, warm_python: Path) -> None:
    env = verl_environment({"FP16_PATCH": "1"} if order == "the entry point" else {})
    check = f"{ORDERS[order]}\nstep = m.FSDPEngine.optimizer_step.__wrapped__\nassert not hasattr(step, '__wrapped__')"
    subprocess.run([warm_python, "-c", check], env=env, check=True, capture_output=True)


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A release in which the engine's optimizer step is other code."""

    def change() -> None:
        original = Patch.from_toml.__func__  # type: ignore[attr-defined]

        def from_toml(cls: type[Patch], path: Any) -> Patch:
            patch = original(cls, path)
            if patch.name == "fsdp-step-outcome":
                patch.variants[0].releases.update(dict.fromkeys(patch.releases, "0" * 16))
            return patch

        monkeypatch.setattr(Patch, "from_toml", classmethod(from_toml))

    return change


def test_unknown_code_is_refused_with_symbol_release_and_way_out(
    changed: Callable[[], None],
) -> None:
    # Once refused, we refuse its import, too.
    engine = import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngine
    changed()
    with pytest.raises(PatchError) as caught:
        fp16_patch.activate(Plan())
    message = str(caught.value)
    assert f"FSDPEngine.optimizer_step of verl {RELEASE}" in message
    assert "FP16_PATCH_STRICT=0" in message
    assert not hasattr(engine.optimizer_step, "__wrapped__")
    assert not hasattr(engine.lr_scheduler_step, "__wrapped__")


def test_unknown_code_is_one_warning_when_not_strict(
    changed: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    changed()
    fp16_patch.activate(Plan(strict=False))
    assert capfd.readouterr().err.count("is not code this patch was written for") == 1


def test_a_swallowed_refusal_still_keeps_the_process_from_training(warm_python: Path) -> None:
    # As verl and vLLM do: the plugin's exception is caught, the program goes on.
    program = """
try:
    import fp16_patch
    fp16_patch.activate()
except Exception:
    pass
import verl.trainer.ppo.v1.trainer_base
"""
    run = subprocess.run(
        [warm_python, "-c", program],
        env=verl_environment({"FP16_PATCH": "fp8"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "fp16_patch refused to run" in run.stderr


def test_a_class_that_ray_sends_may_refer_to_a_patched_function() -> None:
    pickle = pytest.importorskip("ray.cloudpickle")
    fp16_patch.activate(Plan())
    from verl.utils import config

    # As verl's V0 task runner: its module's name is an actor class, so Ray sends the class itself.
    namespace = {"validate_config": config.validate_config}
    exec("class TaskRunner:\n    def run(self):\n        return validate_config", namespace)
    runner = pickle.loads(pickle.dumps(namespace["TaskRunner"]))
    assert runner().run() is config.validate_config
