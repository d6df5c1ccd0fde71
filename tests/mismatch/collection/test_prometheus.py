"""What Prometheus is given of a run, and a dashboard that asks for nothing else."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray_metrics = pytest.importorskip("ray.util.metrics")

from fp16_patch.mismatch.collection import prometheus
from fp16_patch.mismatch.collection.part import Part
from fp16_patch.mismatch.collection.prometheus import DESCRIPTIONS, PrometheusSink, description, exported_name
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.scaling.scaler import StepHistory, StepOutcome
from integration.recipes.dashboard import DASHBOARD, dashboard, text

COVERAGE = {"tokens": 900, "expected_tokens": 1024, "ranks": 7, "expected_ranks": 8, "dropped": 0, "complete": False}
ALERT = {"name": "k1", "value": 0.2, "threshold": 0.1, "since": 5}
PATIENCE_S = 10.0


class Exported:
    """What Ray would export: (name, labels) → the value last set, where it is a number."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.was_set = threading.Event()

    def gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Gauge:
        return Gauge(self, name, description, tag_keys)

    def __getitem__(self, name: str) -> float:
        return self.values[(name, "run=r")]


class Gauge:
    """Stands in for Ray's, and is as particular about labels and characters."""

    def __init__(self, exported: Exported, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        (name + description).encode("ascii")
        self._exported, self._name, self._tag_keys = exported, name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self._tag_keys
        labels = ",".join(f"{name}={label}" for name, label in tags.items())
        labels.encode("ascii")
        self._exported.values.pop((self._name, labels), None)
        if math.isfinite(value):
            self._exported.values[(self._name, labels)] = value
        self._exported.was_set.set()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    found = Exported()
    monkeypatch.setattr(ray_metrics, "Gauge", found.gauge)
    return found


@pytest.fixture
def sink(exported: Exported) -> Iterator[PrometheusSink]:
    created = PrometheusSink("r")
    yield created
    created.close()


def measured(step: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"step": step, "time": 1.0, "metrics": metrics, "state": {}, "coverage": COVERAGE, "alerts": [], **more}


def stepped(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "time": 1.0, "metrics": metrics}


def names() -> set[str]:
    """Every name in the record of a run in float16 with a critic that is exported."""
    stats = MismatchStats.from_log_probs(*torch.zeros(2, 1, 1), mask=torch.ones(1, 1))
    history = StepHistory()
    history.add(StepOutcome(loss_scale=1.0, skipped=False, grad_norm=1.0))
    fp16 = set(history.metrics())
    critic = {name.replace("fp16/", "fp16/critic/") for name in fp16}
    coverage = {f"coverage/{name}" for name in COVERAGE}
    return {*Part(stats, stats).metrics(), *fp16, *critic, *coverage, "step", "mismatch_step", "alert", "alerts"}


def test_a_measured_step_is_exported_under_readable_names(sink: PrometheusSink, exported: Exported) -> None:
    sink(measured(7, {"mismatch/mean_abs": 2e-3, "mismatch/abs_p99_9": 0.5}))
    assert exported.values == {
        ("fp16_patch_mismatch_step", "run=r"): 7,
        ("fp16_patch_mismatch_mean_abs", "run=r"): 2e-3,
        ("fp16_patch_mismatch_abs_p99_9", "run=r"): 0.5,
        ("fp16_patch_coverage_tokens", "run=r"): 900,
        ("fp16_patch_coverage_expected_tokens", "run=r"): 1024,
        ("fp16_patch_coverage_ranks", "run=r"): 7,
        ("fp16_patch_coverage_expected_ranks", "run=r"): 8,
        ("fp16_patch_coverage_dropped", "run=r"): 0,
        ("fp16_patch_coverage_complete", "run=r"): 0,
        ("fp16_patch_alerts", "run=r"): 0,
    }


def test_of_the_frameworks_metrics_only_ours_are_exported(sink: PrometheusSink, exported: Exported) -> None:
    sink(stepped(3, {"fp16/loss_scale": 1024.0, "fp16/critic/skipped_total": 0, "actor/grad_norm": 1.5, "fp16/x": "y"}))
    assert exported.values == {
        ("fp16_patch_step", "run=r"): 3,
        ("fp16_patch_loss_scale", "run=r"): 1024,
        ("fp16_patch_critic_skipped_total", "run=r"): 0,
    }


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_no_number_withdraws_the_one_before(
    sink: PrometheusSink, exported: Exported, lost: float | None
) -> None:
    sink(measured(1, {"mismatch/mean_abs": 0.1, "mismatch/tokens": 8.0}))
    sink(measured(2, {"mismatch/mean_abs": lost, "mismatch/tokens": 0.0}))
    assert ("fp16_patch_mismatch_mean_abs", "run=r") not in exported.values
    assert exported["fp16_patch_mismatch_tokens"] == 0


def test_a_line_withdraws_what_only_its_predecessor_had(sink: PrometheusSink, exported: Exported) -> None:
    sink(measured(1, {"mismatch/mean_abs": 0.1}))
    sink(stepped(1, {"fp16/step_skipped": 1.0, "fp16/loss_scale": 8.0}))
    sink(stepped(2, {"fp16/loss_scale": 4.0}))
    assert ("fp16_patch_step_skipped", "run=r") not in exported.values
    assert (exported["fp16_patch_loss_scale"], exported["fp16_patch_mismatch_mean_abs"]) == (4, 0.1)


def test_an_alert_stands_until_a_line_without_it(sink: PrometheusSink, exported: Exported) -> None:
    sink(measured(5, {}, alerts=[ALERT, {**ALERT, "name": "ess"}]))
    assert exported.values[("fp16_patch_alert", "run=r,alert=k1")] == 1
    assert exported["fp16_patch_alerts"] == 2
    sink(stepped(5, {}))
    sink(measured(6, {}, alerts=[ALERT]))
    assert ("fp16_patch_alert", "run=r,alert=ess") not in exported.values
    assert exported.values[("fp16_patch_alert", "run=r,alert=k1")] == exported["fp16_patch_alerts"] == 1


def test_what_stands_is_set_again_because_ray_forgets_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "REPEAT_S", 0.01)
    sink = PrometheusSink("r")
    sink(measured(1, {"mismatch/mean_abs": 0.1}))
    exported.values.clear()
    exported.was_set.clear()
    assert exported.was_set.wait(PATIENCE_S)
    sink.close()
    assert exported.values == {}


def test_a_runs_name_may_hold_any_characters(exported: Exported) -> None:
    PrometheusSink("größe 7")(stepped(1, {}))
    assert exported.values == {("fp16_patch_step", r"run=gr\xf6\xdfe 7"): 1}


def test_every_metric_says_what_it_is() -> None:
    assert {name for name in names() if "critic" not in name} <= DESCRIPTIONS.keys()
    assert description("fp16/critic/loss_scale") == "Loss scale, the smallest of the step's updates, of the critic"
    assert description("fp16/zero_rows/head") == f"{DESCRIPTIONS['fp16/zero_rows']}: head"
    assert description("mismatch/µ") == r"mismatch/\xb5"
    assert all(help.isascii() for help in DESCRIPTIONS.values())


def test_the_dashboard_asks_for_nothing_that_is_not_exported() -> None:
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    variables = [variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable]
    asked = {name for expression in expressions + variables for name in re.findall(r"\bray_\w+", expression)}
    assert len(asked) > len(dashboard()["panels"])
    assert asked <= {exported_name(name) for name in names()}


def test_the_dashboard_on_disk_is_the_one_that_is_generated() -> None:
    assert DASHBOARD.read_text(encoding="utf-8") == text(), "run: python -m integration.recipes.dashboard"


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    model = json.loads(text())
    variables = {variable["name"]: variable for variable in model["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    assert model["id"] is None
    identities = [panel["id"] for panel in model["panels"]]
    assert len(set(identities)) == len(identities)
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in model["panels"]]
    assert len(set(cells)) == len(cells)
    for panel in model["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${DS_PROMETHEUS}"}
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"])
