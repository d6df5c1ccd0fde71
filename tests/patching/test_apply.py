"""What is put in a method's place: it is called, undone and sent to other processes as the method would be."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fp16_patch.patching import declarations
from fp16_patch.patching.apply import PatchSet
from fp16_patch.patching.declarations import Patch, Status, Variant, Verdict
from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.plan.errors import PatchError

SOURCE = """
class Worker:
    factor = 3

    def step(self, value, times=1):
        return self.factor * value * times

    @classmethod
    def scaled(cls, value):
        return cls.factor * value

    @staticmethod
    def plain(value):
        return value

class Special(Worker):
    pass
"""


def negative(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    assert worker.factor
    return -wrapped(*args, **kwargs)


def negative_of_class(wrapped: Any, owner: Any, args: Any, kwargs: Any) -> Any:
    return -wrapped(*args, **kwargs)


@pytest.fixture
def framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    package = tmp_path / "framework_in_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "workers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(declarations, "installed_release", lambda _package: "1.0")
    yield importlib.import_module("framework_in_a_test.workers")
    for name in ("framework_in_a_test", "framework_in_a_test.workers"):
        sys.modules.pop(name, None)


@pytest.fixture
def patched(framework: ModuleType) -> Iterator[Any]:
    known = {"1.0": fingerprint(SOURCE, "Worker.step")}
    variant = Variant(target="framework_in_a_test.workers:Worker.step", releases=known, hook=f"{__name__}:negative")
    patches = PatchSet((Patch("steps", "framework_in_a_test", "Because.", "never", (variant,)),))
    patches.install()
    assert patches.report() == {"steps": "applied"}
    yield framework
    patches.undo()
    assert framework.Worker().step(1) == 3


def applied(target: str, hook: str) -> PatchSet:
    """A patch set that applied a hook to a target, wherever its class has it from."""
    variant = Variant(target=f"framework_in_a_test.workers:{target}", releases={}, hook=f"{__name__}:{hook}")
    patch = Patch("one", "framework_in_a_test", "Because.", "never", (variant,))
    patches = PatchSet((patch,))
    patches.verdicts = (Verdict(patch, variant, Status.APPLIES, "1.0", None),)
    patches.install()
    return patches


def test_an_inherited_classmethod_is_given_the_class_that_it_is_called_on(framework: Any) -> None:
    patches = applied("Special.scaled", "negative_of_class")

    class Own(framework.Special):  # type: ignore[misc, name-defined]
        factor = 7

    assert (Own.scaled(2), Own().scaled(2), framework.Special.scaled(2)) == (-14, -14, -6)
    assert framework.Worker.scaled(2) == 6
    patches.undo()
    assert "scaled" not in vars(framework.Special)
    assert (Own.scaled(2), framework.Special.scaled(2)) == (14, 6)


@pytest.mark.parametrize("target", ["Worker.scaled", "Worker.plain", "Special.plain", "Special.step"])
def test_methods_of_every_kind_come_back_as_they_were(framework: Any, target: str) -> None:
    owner, _, name = target.partition(".")
    before = {each: dict(vars(getattr(framework, each))) for each in ("Worker", "Special")}
    patches = applied(target, "negative_of_class")
    assert getattr(getattr(framework, owner)(), name)(2) < 0
    patches.undo()
    assert {each: dict(vars(getattr(framework, each))) for each in before} == before


@pytest.mark.parametrize("name", ["Worker", "Special"])
def test_a_method_is_called_on_an_instance_or_by_its_class(patched: Any, name: str) -> None:
    worker = getattr(patched, name)()
    assert worker.step(2) == -6
    assert worker.step(2, times=2) == -12
    assert getattr(patched, name).step(worker, 2, times=2) == -12
    with pytest.raises(TypeError):
        patched.Worker.step()


def test_a_method_is_sent_by_its_name(patched: Any) -> None:
    assert patched.Worker.step is patched.Worker.step
    assert pickle.loads(pickle.dumps(patched.Worker.step)) is patched.Worker.step


def test_an_actors_class_runs_what_its_process_has_in_the_methods_place(patched: Any) -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")

    def made_by_ray(method: Any) -> type:
        # As Ray makes an actor's class: sent by value, and with a copy of each method it inherits.
        class Actor(patched.Worker):  # type: ignore[misc, name-defined]
            def step(self, *args: Any, **kwargs: Any) -> Any:
                return method(self, *args, **kwargs)

        return Actor

    sent = cloudpickle.loads(cloudpickle.dumps(made_by_ray(patched.Worker.step)))
    assert sent().step(2) == -6


def broken(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) * worker.engine_config.factor


def patch_of(target: str, hook: str, dtype: str | None) -> PatchSet:
    variant = Variant(target=f"framework_in_a_test.workers:{target}", releases={}, hook=hook)
    patch = Patch("one", "framework_in_a_test", "Because.", "never", (variant,), observes=True)
    patches = PatchSet((patch,), dtype=dtype)
    patches.verdicts = (Verdict(patch, variant, Status.APPLIES, "1.0", None),)
    return patches


@pytest.mark.parametrize("target", ["Worker.step", "Worker.scaled", "Special.plain"])
def test_a_hook_that_fails_stops_nothing_where_the_plan_observes(
    framework: Any, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    patches = patch_of(target, f"{__name__}:broken", None)
    patches.install()
    owner, _, name = target.partition(".")
    called = getattr(getattr(framework, owner)(), name)
    assert (called(2), called(2)) == {"plain": (2, 2)}.get(name, (6, 6))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "in the patch one (of framework_in_a_test 1.0); the run goes on without it" in warning
    assert "AttributeError" in warning
    patches.undo()


def test_a_hook_that_fails_says_whose_it_is_where_the_plan_decides(framework: Any) -> None:
    patches = patch_of("Worker.step", f"{__name__}:broken", "float16")
    patches.install()
    with pytest.raises(AttributeError) as failed:
        framework.Worker().step(2)
    (note,) = getattr(failed.value, "__notes__", [str(failed.value.__cause__)])
    assert "in the patch one (of framework_in_a_test 1.0), and not in the framework's own code" in note
    with pytest.raises(TypeError) as theirs:
        framework.Worker().step()
    assert not getattr(theirs.value, "__notes__", [])
    patches.undo()


@pytest.mark.parametrize("hook", ["no_such_module_of_ours:hook", f"{__name__}:no_such_hook"])
def test_a_module_that_cannot_be_patched_is_not_imported_later_either(
    framework: Any, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = framework.__name__
    observing = patch_of("Worker.step", hook, None)
    observing.install()
    assert framework.Worker().step(2) == 6
    assert "the run goes on without it" in caplog.text
    observing.undo()

    del sys.modules[name]
    deciding = patch_of("Worker.step", hook, "float16")
    deciding.install()
    with pytest.raises((ImportError, AttributeError)):
        importlib.import_module(name)
    # wrapt has called its hooks; without more, this would train as if we were not there.
    for _ in range(2):
        with pytest.raises(PatchError, match=f"{name} is not imported: fp16_patch failed in the patch one"):
            importlib.import_module(name)
    deciding.undo()
    assert importlib.import_module(name).Worker().step(2) == 6
