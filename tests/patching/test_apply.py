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
        del sys.modules[name]


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
