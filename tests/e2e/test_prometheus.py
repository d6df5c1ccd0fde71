"""A real Prometheus scrapes a real Ray, and has data for every line of the dashboard."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")
PROMETHEUS = shutil.which("prometheus")
if PROMETHEUS is None:
    pytest.skip("needs the program `prometheus`: Debian's package of that name", allow_module_level=True)

from fp16_patch.mismatch.collection.part import Part
from fp16_patch.mismatch.collection.prometheus import PrometheusSink
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.scaling.scaler import StepHistory, StepOutcome
from integration.recipes import dashboard
from integration.recipes.check_dashboard import without_data

RUN = "e2e"
SAMPLE = Path(dashboard.__file__).with_name("prometheus.yml")
PATIENCE_S = 30.0
# Ray 2.60 exports for 20 s more what is not set again.
FORGOTTEN_S = 22.0


@dataclass(frozen=True)
class Watched:
    """A sink in an actor of a real Ray, and the Prometheus that scrapes it."""

    sink: Any
    url: str

    def take(self, line: dict[str, Any]) -> None:
        ray.get(self.sink.__call__.remote(line))

    def values(self, expression: str) -> list[float]:
        """The expression's value now, of each series."""
        return [float(series["value"][1]) for series in self._ask("query", query=expression)["result"]]

    def jobs_up(self) -> set[str]:
        """Jobs of the configuration that have a target which answers."""
        targets = self._ask("targets", state="active")["activeTargets"]
        return {target["labels"]["job"] for target in targets if target["health"] == "up"}

    def _ask(self, question: str, **arguments: str) -> Any:
        url = f"{self.url}/api/v1/{question}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The parameter: whether Ray has its dashboard, which tells Prometheus where Ray's nodes are."""
    # Not pytest's directory: a socket's path must be short.
    ray_directory, port = tempfile.mkdtemp(prefix="ray-"), free_port()
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=request.param,
        object_store_memory=80 * 2**20,
        _temp_dir=ray_directory,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    try:
        sink = ray.remote(num_cpus=0)(PrometheusSink).remote(RUN)
        with prometheus(configuration(ray_directory, port), tmp_path_factory.mktemp("prometheus")) as url:
            yield Watched(sink, url)
    finally:
        ray.shutdown()
        shutil.rmtree(ray_directory, ignore_errors=True)


def configuration(ray_directory: str, port: int) -> str:
    """The sample, with the places of this Ray and less patience."""
    text = SAMPLE.read_text(encoding="utf-8")
    for sample, here in (("/tmp/ray", ray_directory), ("8090", str(port)), ("interval: 15s", "interval: 1s")):
        assert sample in text
        text = text.replace(sample, here)
    return text


@contextmanager
def prometheus(configuration: str, directory: Path) -> Iterator[str]:
    """The URL of a server that is ready."""
    (directory / "prometheus.yml").write_text(configuration, encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(PROMETHEUS),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (directory / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            assert eventually(lambda: is_ready(f"http://{address}")), (directory / "log.txt").read_text()
            yield f"http://{address}"
        finally:
            server.kill()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold, in a time that is bounded."""
    end = time.monotonic() + PATIENCE_S
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.5)
    return held


def measured(step: int, shift: float) -> dict[str, Any]:
    """A line of `mismatch.jsonl`: the learner is off by ``shift`` on half of the tokens, and an alert stands."""
    sampler = -torch.rand(8, 16, generator=torch.Generator().manual_seed(step)) - 0.5
    learner = sampler + shift * (torch.arange(16) % 2)
    stats = MismatchStats.from_log_probs(sampler, learner, torch.ones(8, 16))
    part = Part(stats, noise_floor=MismatchStats.from_log_probs(sampler, sampler, torch.ones(8, 16)))
    return {
        "step": step,
        "time": time.time(),
        "metrics": part.metrics(),
        "state": stats.to_dict(),
        "coverage": dict.fromkeys(("tokens", "expected_tokens", "ranks", "expected_ranks"), 128) | {"dropped": 0},
        "alerts": [{"name": "k1", "value": 0.2, "threshold": 0.1, "since": 1}],
    }


def stepped(step: int) -> dict[str, Any]:
    """A line of `steps.jsonl`, with a loss scale for actor and critic."""
    history = StepHistory()
    history.add(StepOutcome(loss_scale=1024.0, skipped=True, grad_norm=math.inf))
    critic = {name.replace("fp16/", "fp16/critic/"): value for name, value in history.metrics().items()}
    return {"step": step, "time": time.time(), "metrics": {**history.metrics(), **critic}}


@pytest.mark.parametrize("watched", [False], indirect=True, ids=["without Ray's dashboard"])
def test_a_value_outlasts_a_long_step_and_a_missing_one_is_a_gap(watched: Watched) -> None:
    mean_abs = dashboard.latest("mismatch/mean_abs").replace("$run", RUN)
    watched.take(measured(1, shift=0.5))
    time.sleep(FORGOTTEN_S)
    assert watched.values(mean_abs) == [pytest.approx(0.25)]
    watched.take(measured(2, shift=math.nan))
    assert eventually(lambda: watched.values(mean_abs) == [])
    assert watched.values(dashboard.latest("mismatch_step").replace("$run", RUN)) == [2]


@pytest.mark.parametrize(
    ("watched", "jobs"),
    [(False, {"ray-without-dashboard"}), (True, {"ray", "ray-without-dashboard"})],
    indirect=["watched"],
    ids=["without Ray's dashboard", "with Ray's dashboard"],
)
def test_every_line_of_the_dashboard_has_data(watched: Watched, jobs: set[str]) -> None:
    watched.take(measured(3, shift=0.25))
    watched.take(stepped(3))
    missing: list[tuple[str, str]] = []

    def all_there() -> bool:
        missing[:] = without_data(watched.url, dashboard.dashboard(), RUN, minutes=2)
        return not missing

    assert eventually(all_there), missing
    assert watched.values(dashboard.latest("mismatch/mean_abs").replace("$run", RUN)) == [pytest.approx(0.125)]
    assert watched.values(dashboard.latest("fp16/loss_scale").replace("$run", RUN)) == [1024]
    assert eventually(lambda: watched.jobs_up() == jobs), watched.jobs_up()
