"""What every declared patch owes on the frameworks that are installed: it knows them, goes on, and comes off again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import wrapt

import fp16_patch
from fp16_patch import Plan
from fp16_patch.patching.code_object_patch import function_of
from fp16_patch.patching.declarations import Patch, Status, Variant, Verdict, declared_patches, installed_release
from fp16_patch.patching.sources import installed_file
from fp16_patch.runtime.activation import attestation, owed_patches
from integration.cpu import megatron_stand_in
from tests.conftest import openrlhf_environment, verl_environment

FRAMEWORKS = [name for name in ("verl", "openrlhf") if installed_release(name)]
pytestmark = [pytest.mark.verl, pytest.mark.openrlhf]
if not FRAMEWORKS:
    pytest.skip("needs a framework", allow_module_level=True)

VERDICTS = [verdict for patch in declared_patches() if (verdict := patch.verify()).status is not Status.ABSENT]
NEEDED = [verdict for verdict in VERDICTS if verdict.status is not Status.EXEMPT]
KINDS = ("worker", "server", "sampler_worker", "task_runner", "driver")


def name_of(verdict: Verdict) -> str:
    return verdict.patch.name


@cache
def missing_for(module: str) -> str | None:
    """What is not installed of what a module needs: some engines and samplers have packages of their own."""
    try:
        import_module(module)
    except ImportError as problem:
        if str(problem.name).partition(".")[0] in FRAMEWORKS:
            raise
        return str(problem.name)
    except ValueError:
        # What verl before 0.8.0 says without a sampler.
        if installed_release("vllm"):
            raise
        return "vllm"
    return None


def symbol(variant: Variant) -> Any:
    if missing := missing_for(variant.module):
        pytest.skip(f"{variant.module} needs {missing}")
    return wrapt.resolve_path(import_module(variant.module), variant.qualname)[2]


def state(variant: Variant) -> Any:
    """What a patch changes: the symbol, or the code of the function behind it."""
    return function_of(symbol(variant)).__code__ if variant.edit else symbol(variant)


@pytest.fixture(autouse=True, scope="module")
def megatron_is_found() -> Iterator[None]:
    with megatron_stand_in.installed():
        yield


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    fp16_patch.deactivate()


@pytest.mark.parametrize("verdict", NEEDED, ids=name_of)
def test_it_applies_to_the_installed_release(verdict: Verdict) -> None:
    assert verdict.status is Status.APPLIES, verdict
    if verdict.patch.package == verdict.patch.framework:
        assert verdict.fingerprint == verdict.variant.releases[str(verdict.release)]


@pytest.mark.parametrize("verdict", NEEDED, ids=name_of)
def test_on_twice_off_and_on_again_leaves_the_framework_as_it_was(verdict: Verdict) -> None:
    before = state(verdict.variant)
    fp16_patch.activate(Plan())
    once = state(verdict.variant)
    fp16_patch.activate()
    assert state(verdict.variant) is once is not before
    fp16_patch.deactivate()
    assert state(verdict.variant) is before
    fp16_patch.deactivate()
    fp16_patch.activate(Plan())
    assert state(verdict.variant) is not before
    fp16_patch.deactivate()
    assert state(verdict.variant) is before


@pytest.mark.parametrize("verdict", [each for each in NEEDED if each.variant.bound], ids=name_of)
def test_names_bound_elsewhere_are_the_wrapper_too(verdict: Verdict) -> None:
    unpatched = symbol(verdict.variant)
    # Some of the modules are in some releases only.
    bound = [each.partition(":") for each in verdict.variant.bound if installed_file(each.partition(":")[0])]
    before = [getattr(import_module(module), name) for module, _, name in bound]
    fp16_patch.activate(Plan())
    assert all(getattr(import_module(module), name) is symbol(verdict.variant) for module, _, name in bound)
    fp16_patch.deactivate()
    assert [getattr(import_module(module), name) for module, _, name in bound] == before
    assert symbol(verdict.variant) is unpatched


FIND_MEGATRON = "from integration.cpu import megatron_stand_in; megatron_stand_in.install()"
ACTIVATE = "import fp16_patch; fp16_patch.activate()"
SHOW = "from fp16_patch.runtime.activation import attestation; print(attestation()['patches'])"


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("first", ["import", "activate"])
def test_import_and_activation_come_in_any_order(framework: str, first: str, warm_python: Path) -> None:
    environment = {"verl": verl_environment, "openrlhf": openrlhf_environment}[framework]()
    of_it = [each for each in NEEDED if each.patch.framework == framework and not missing_for(each.variant.module)]
    imports = "\n".join(sorted({f"import {verdict.variant.module}" for verdict in of_it}))
    program = [imports, ACTIVATE] if first == "import" else [ACTIVATE, imports]
    run = subprocess.run(
        [warm_python, "-c", "\n".join([FIND_MEGATRON, *program, SHOW])],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    report = run.stdout.splitlines()[-1]
    assert all(f"'{verdict.patch.name}': 'applied'" in report for verdict in of_it)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_the_installed_release_does_without_is_neither_applied_nor_owed(framework: str) -> None:
    of_it = [verdict for verdict in VERDICTS if verdict.patch.framework == framework]
    exempt = {verdict.patch.name for verdict in of_it if verdict.status is Status.EXEMPT}
    fp16_patch.activate(Plan())
    report = attestation()["patches"]
    owed = {name for kind in KINDS for name in owed_patches(framework, kind)}
    assert {name for name, state in report.items() if state == "exempt"} & {name_of(each) for each in of_it} == exempt
    assert owed
    assert not exempt & owed


@pytest.mark.parametrize("patch", declared_patches(), ids=lambda patch: patch.name)
def test_a_hook_is_there_and_says_what_it_does(patch: Patch) -> None:
    for variant in patch.variants:
        if variant.hook:
            assert callable(variant.load_hook())
            assert variant.load_hook().__doc__
