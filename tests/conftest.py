"""What the tests share: the folders of the CPU bed, and the tiny models that real frameworks run on."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
CPU = ROOT / "integration" / "cpu"
sys.path.insert(0, str(CPU))
# Machines are noisy; and what CI finds, it must find again.
settings.register_profile("steady", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("steady")


def take_back() -> None:
    """Deactivate the plan that is active, and remove what the environment says of one."""
    if "fp16_patch.runtime.activation" in sys.modules:
        sys.modules["fp16_patch.runtime.activation"].deactivate()
    for name in [name for name in os.environ if name.startswith("FP16_PATCH")]:
        del os.environ[name]


# Fixtures decide what is active; the caller's shell must not.
take_back()

from integration.cpu.launch import ENVIRONMENT, SGLANG_ENVIRONMENT, SGLANG_PACKAGES
from integration.cpu.warm.servers import IMPORTS, WarmServers, of_this_process
from tests.ranks import Ranks

# verl reads its platform from here when any test first imports it.
os.environ.update(ENVIRONMENT)


# Tests of these files share what their fixtures keep, or wait for each other: with pytest-xdist, one process runs a
# group, and so does one a file that is in none. Those that take longest come first.
RUNS, LEARNERS = "runs of frameworks", "learners"
GROUPS = {
    "tests/e2e/test_edited_verl_runs.py": RUNS,
    "tests/e2e/test_openrlhf_runs.py": RUNS,
    "tests/e2e/test_verl_async_runs.py": RUNS,
    "tests/e2e/test_verl_megatron_runs.py": RUNS,
    "tests/e2e/test_verl_runs.py": RUNS,
    "tests/e2e/test_verl_sft_runs.py": RUNS,
    "tests/e2e/test_verl_sglang_runs.py": RUNS,
    "tests/e2e/test_verl_v0_runs.py": RUNS,
    "tests/integration/bench/test_smoke.py": RUNS,
    "tests/integration/demo/test_smoke.py": RUNS,
    "tests/integration/recipes/test_smoke.py": RUNS,
    "tests/verl/fsdp/test_learner.py": LEARNERS,
    "tests/verl/test_edited_tree.py": LEARNERS,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("EVERY_ARM"):
        of_the_matrix = [item for item in items if item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=of_the_matrix)
        items[:] = [item for item in items if item not in of_the_matrix]
    # To import a framework's half of fp16_patch, as a module of tests may, is to ask for the plan.
    take_back()
    order = list(dict.fromkeys([*GROUPS.values(), None]))
    items.sort(key=lambda item: order.index(GROUPS.get(_file(item.nodeid))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.groups import Groups

    # By size, the many small tests would come first.
    config.option.loadscopereorder = False
    return Groups(lambda nodeid: GROUPS.get(_file(nodeid), _file(nodeid)), config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def verl_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment for verl processes on a CPU, started without the launcher."""
    return {**os.environ, "PYTHONPATH": _search_path(CPU, ROOT), **extra}


def sglang_environment() -> dict[str, str]:
    """The environment for processes of verl with SGLang on a CPU, started without the launcher."""
    return verl_environment({**SGLANG_ENVIRONMENT, "PYTHONPATH": _search_path(CPU, SGLANG_PACKAGES, ROOT)})


def openrlhf_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment for OpenRLHF processes on a CPU, started without the launcher."""
    from integration.cpu import launch_openrlhf

    path = _search_path(launch_openrlhf.STARTUP, CPU, ROOT)
    return {**os.environ, **launch_openrlhf.ENVIRONMENT, "PYTHONPATH": path, **extra}


def _search_path(*ours: Path) -> str:
    # The caller's stays: another release of a framework may lie on it.
    return os.pathsep.join(filter(None, [*map(str, ours), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def nothing_stays_active(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan outlives a test, nor what carries one to the processes that the next test starts."""
    _hear_our_warnings()
    yield
    monkeypatch.undo()
    take_back()


def _hear_our_warnings() -> None:
    """Take back what libraries that tests import do to everybody's log: they raise levels, and disable loggers.

    What vLLM is hosted by raises the level of all handlers, too; pytest's stay the same from test to test.
    """
    logging.disable(logging.NOTSET)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers:
        handler.setLevel(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("fp16_patch") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2.4 million parameters with its tokenizer."""
    pytest.importorskip("transformers")
    from integration.cpu.tiny_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_value_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with an untrained head that gives each token one number."""
    from integration.cpu.tiny_model import make_random_value_model

    return make_random_value_model(tmp_path_factory.mktemp("tiny_value_model"), tiny_model)


@pytest.fixture(scope="session")
def tiny_reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that scores sequences, with the tokenizer of `tiny_model`."""
    from integration.cpu.tiny_model import make_random_reward_model

    return make_random_reward_model(tmp_path_factory.mktemp("tiny_reward_model"), tiny_model)


@pytest.fixture(scope="session")
def warm_servers() -> WarmServers:
    """Processes that need not import torch; the benches start theirs from the same servers."""
    return of_this_process()


@pytest.fixture(scope="session")
def warm_python(warm_servers: WarmServers) -> Path:
    """An executable that stands for `python`: its processes need not import what frameworks and vLLM are built on."""
    return warm_servers.server(IMPORTS, verl_environment()).interpreter


@pytest.fixture(scope="session")
def warm_python_for_sglang(warm_servers: WarmServers) -> Path:
    """The same for runs with SGLang, which find stand-ins for packages that transformers looks for, too."""
    return warm_servers.server(IMPORTS, sglang_environment()).interpreter


def python_of_runs(warm: Path) -> Path:
    """What runs are started with: as `RUNS_START_COLD` asks, and the matrix does, what a user would start them with."""
    return Path(sys.executable) if os.environ.get("RUNS_START_COLD") else warm


@pytest.fixture(scope="session")
def on_ranks(warm_servers: WarmServers) -> Ranks:
    return Ranks(warm_servers)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this process's observers report, each (who, *what)."""
    from fp16_patch.mismatch.collection import rank

    seen: list[Any] = []

    class Observer:
        def __init__(self, *who: Any) -> None:
            self.who = who

        def observe(self, *what: Any) -> None:
            seen.append((self.who, *what))

    monkeypatch.setattr(rank, "Observer", Observer)
    monkeypatch.setattr(rank, "_observers", {})
    return seen
