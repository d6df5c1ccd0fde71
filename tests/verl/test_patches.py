"""What every declared patch owes: the same on and off, in every order, and only on code it knows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

import fp16_patch
from fp16_patch import PatchError, Plan
from fp16_patch.activation import attestation, owed_patches
from fp16_patch.patching import Patch, PatchSet, Status, installed_release
from tests.conftest import verl_environment

pytestmark = pytest.mark.verl

ALL = PatchSet.declared(changes=True, strict=True).patches
RELEASE = str(installed_release("verl"))
OF_VERL = [patch for patch in ALL if patch.framework == "verl"]
VERL = [patch for patch in OF_VERL if patch.exemption_in(RELEASE) is None]


def symbol(patch: Patch) -> Any:
    owner: Any = import_module(patch.module)
    *path, name = patch.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return vars(owner).get(name, getattr(owner, name))


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_a_patch_says_what_why_and_until_when(patch: Patch) -> None:
    assert callable(patch.load_hook())
    assert patch.load_hook().__doc__
    assert len(patch.why) > 20
    assert patch.retire
    assert patch.releases


@pytest.mark.parametrize("patch", VERL, ids=lambda patch: patch.name)
def test_a_patch_applies_to_the_installed_release(patch: Patch) -> None:
    verdict = patch.verify()
    assert verdict.status is Status.APPLIES, verdict
    assert verdict.fingerprint == patch.releases[RELEASE]


def test_what_the_installed_release_does_without_is_neither_applied_nor_owed() -> None:
    exempt = {patch.name for patch in OF_VERL} - {patch.name for patch in VERL}
    fp16_patch.activate(Plan())
    report, owed = attestation()["patches"], owed_patches("verl", "worker")
    assert {name for name, state in report.items() if state == "exempt"} == exempt
    assert owed
    assert not exempt & set(owed)
    others = {patch.name for patch in VERL}
    assert all(patch.exemption_in(RELEASE).text in others for patch in OF_VERL if patch.name in exempt)  # type: ignore[union-attr]


@pytest.mark.parametrize("patch", VERL, ids=lambda patch: patch.name)
def test_on_and_off_leaves_verl_as_it_was(patch: Patch) -> None:
    before = symbol(patch)
    fp16_patch.activate(Plan())
    once = symbol(patch)
    fp16_patch.activate()
    assert symbol(patch) is once is not before
    assert once.__wrapped__ is not None
    fp16_patch.deactivate()
    assert symbol(patch) is before
    fp16_patch.deactivate()


@pytest.mark.parametrize("patch", [patch for patch in VERL if patch.bound], ids=lambda patch: patch.name)
def test_names_bound_elsewhere_are_the_wrapper_too(patch: Patch) -> None:
    modules = [reference.partition(":") for reference in patch.bound]
    before = [getattr(import_module(module), name) for module, _, name in modules]
    fp16_patch.activate(Plan())
    assert all(getattr(import_module(module), name) is symbol(patch) for module, _, name in modules)
    fp16_patch.deactivate()
    assert [getattr(import_module(module), name) for module, _, name in modules] == before


IMPORT = "import verl.workers.engine.fsdp.transformer_impl as m"
ACTIVATE = "import fp16_patch; fp16_patch.activate()"
ORDERS = {
    "activate, then import": f"{ACTIVATE}; {IMPORT}",
    "import, then activate": f"{IMPORT}; {ACTIVATE}",
    "import fp16_patch.verl": f"import fp16_patch.verl; {IMPORT}",
    "the entry point": IMPORT,
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_import_and_activation_wraps_once(order: str) -> None:
    env = verl_environment({"FP16_PATCH": "1"} if order == "the entry point" else {})
    check = f"{ORDERS[order]}\nstep = m.FSDPEngine.optimizer_step.__wrapped__\nassert not hasattr(step, '__wrapped__')"
    subprocess.run([sys.executable, "-c", check], env=env, check=True, capture_output=True)


def test_observe_installs_observers_only() -> None:
    observing = PatchSet.declared(changes=False, strict=True).patches
    assert observing
    assert all(patch.observes for patch in observing)
    assert len(observing) < len(ALL)


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A release in which the engine's optimizer step is other code."""

    def change() -> None:
        original = Patch.from_toml.__func__  # type: ignore[attr-defined]

        def from_toml(cls: type[Patch], path: Any) -> Patch:
            patch = original(cls, path)
            if patch.name == "fsdp-step-outcome":
                patch.releases.update(dict.fromkeys(patch.releases, "0" * 16))
            return patch

        monkeypatch.setattr(Patch, "from_toml", classmethod(from_toml))

    return change


def test_unknown_code_is_refused_with_symbol_release_and_way_out(
    changed: Callable[[], None],
) -> None:
    changed()
    with pytest.raises(PatchError) as caught:
        fp16_patch.activate(Plan())
    message = str(caught.value)
    assert f"FSDPEngine.optimizer_step of verl {RELEASE}" in message
    assert "FP16_PATCH_STRICT=0" in message
    engine = import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngine
    assert not hasattr(engine.optimizer_step, "__wrapped__")
    assert not hasattr(engine.lr_scheduler_step, "__wrapped__")


def test_unknown_code_is_one_warning_when_not_strict(
    changed: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    changed()
    fp16_patch.activate(Plan(strict=False))
    assert capfd.readouterr().err.count("is not code this patch was written for") == 1


def test_a_swallowed_refusal_still_keeps_the_process_from_training() -> None:
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
        [sys.executable, "-c", program],
        env=verl_environment({"FP16_PATCH": "fp8"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "fp16_patch refused to run" in run.stderr
