"""Write the Grafana dashboard from a table of panels.

python -m integration.recipes.dashboard
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.collection.prometheus import exported_name
from integration.bench import command

DASHBOARD = Path(__file__).with_name("grafana-dashboard.json")

SCHEMA_VERSION = 39
COLUMNS = 2
WIDTH, HEIGHT = 24 // COLUMNS, 8
DATASOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
"""A variable of the dashboard rather than an input of its import, so that it can also be provisioned from a file."""

NATS, PLAIN, SHARE = "suffix: nat", "short", "percentunit"
LINEAR, LOG10, LOG2 = {"type": "linear"}, {"type": "log", "log": 10}, {"type": "log", "log": 2}


@dataclass(frozen=True)
class Panel:
    """One chart over time; `lines` maps what a line is called to its PromQL."""

    title: str
    description: str
    lines: dict[str, str]
    unit: str = PLAIN
    scale: dict[str, Any] = field(default_factory=lambda: LINEAR)
    labels: str = "{{run}}"


def latest(name: str, labels: str = "run") -> str:
    """Ask for a record's metric. `max` joins the series of a monitor that was started again: process labels differ."""
    return f'max by ({labels}) ({exported_name(name)}{{run=~"$run"}})'


def share(part: str, whole: str) -> str:
    return f"{latest(part)} / {latest(whole)}"


PANELS = (
    Panel(
        "Mean |d|",
        "d = log π of the learner − log μ of the sampler, of a sampled token. Mean over the step's tokens. "
        "The noise floor is the learner against itself, in the steps that measure it.",
        {"mean |d|": latest("mismatch/mean_abs"), "noise floor": latest("mismatch/noise_floor_mean_abs")},
        NATS,
        LOG10,
    ),
    Panel(
        "Quantiles of |d|",
        "Half, 90 %, 99 % and 99.9 % of the step's tokens lie below, and the largest.",
        {
            "p50": latest("mismatch/abs_p50"),
            "p90": latest("mismatch/abs_p90"),
            "p99": latest("mismatch/abs_p99"),
            "p99.9": latest("mismatch/abs_p99_9"),
            "max": latest("mismatch/max_abs"),
        },
        NATS,
        LOG10,
    ),
    Panel(
        "KL of sampler and learner",
        "k1 = mean(−d), k3 = mean(r − 1 − d) with r = exp(d), both of KL(μ‖π). "
        "k1 is signed: it is near 0 where differences cancel.",
        {"k1": latest("mismatch/k1"), "k3": latest("mismatch/k3")},
        NATS,
    ),
    Panel(
        "|D| of a sequence",
        "D is the sum of d over a sequence, the logarithm of its importance ratio.",
        {"mean |D|": latest("mismatch/seq_mean_abs"), "max |D|": latest("mismatch/seq_max_abs")},
        NATS,
        LOG10,
    ),
    Panel(
        "Effective sample size",
        "(Σr)² / (n Σr²) of the importance ratios: the share of the samples that a reweighted mean is worth.",
        {"tokens": latest("mismatch/ess"), "sequences": latest("mismatch/seq_ess")},
        SHARE,
    ),
    Panel(
        "χ² of the importance ratios",
        "Mean r² − 1: the variance of the ratios, 0 where sampler and learner agree.",
        {"tokens": latest("mismatch/chi2_token"), "sequences": latest("mismatch/chi2_seq")},
    ),
    Panel(
        "Difference of the probabilities",
        "Of the sampled token, between learner and sampler.",
        {"mean": latest("mismatch/prob_mean_abs"), "max": latest("mismatch/prob_max_abs")},
        PLAIN,
        LOG10,
    ),
    Panel(
        "What corrections would cut",
        "Tokens with a ratio above 2 (TIS), outside 0.5 … 5 (IcePop), and sequences outside 0.5 … 2.",
        {
            "TIS": latest("mismatch/tis_clip_fraction"),
            "IcePop": latest("mismatch/icepop_mask_fraction"),
            "sequences": latest("mismatch/seq_mask_fraction"),
        },
        SHARE,
    ),
    Panel(
        "Coverage",
        "How much of the step was measured. Below 100 % the other panels speak of a part of it.",
        {
            "tokens": share("coverage/tokens", "coverage/expected_tokens"),
            "ranks": share("coverage/ranks", "coverage/expected_ranks"),
        },
        SHARE,
    ),
    Panel(
        "Non-finite log-probabilities",
        "Tokens whose log-probability is NaN or infinite, by the side it comes from.",
        {"sampler": latest("mismatch/nonfinite_sampler"), "learner": latest("mismatch/nonfinite_learner")},
    ),
    Panel(
        "Loss scale",
        "Halves when a gradient overflows. The critic has one of its own.",
        {"actor": latest("fp16/loss_scale"), "critic": latest("fp16/critic/loss_scale")},
        PLAIN,
        LOG2,
    ),
    Panel(
        "Skipped updates",
        "Updates not taken because a gradient overflowed: in a row, and since the run began.",
        {
            "in a row": latest("fp16/consecutive_skips"),
            "in all": latest("fp16/skipped_total"),
            "critic, in all": latest("fp16/critic/skipped_total"),
        },
    ),
    Panel(
        "Alerts standing",
        "1 while the alert stands, and how many do.",
        {"": latest("alert", labels="run, alert"), "in all": latest("alerts")},
        labels="{{run}} {{alert}}",
    ),
    Panel(
        "Progress",
        "The step on record, and the step whose mismatch was measured last; they part where nothing can be measured.",
        {"step": latest("step"), "mismatch": latest("mismatch_step")},
    ),
)


def dashboard() -> dict[str, Any]:
    """Return Grafana's classic dashboard model, with the data source and the runs to show as variables."""
    return {
        "uid": "fp16-patch-mismatch",
        "title": "Mismatch of sampler and learner",
        "tags": ["fp16_patch"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "id": None,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "timepicker": {},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": [_panel(panel, number) for number, panel in enumerate(PANELS)],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "DS_PROMETHEUS",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }


def _run_variable() -> dict[str, Any]:
    runs = f"label_values({exported_name('step')}, run)"
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": runs,
        "query": {"query": runs, "refId": "runs"},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "includeAll": True,
        "multi": True,
        "options": [],
        # When the dashboard's time range changes, too: a run's name is known only while there are samples of it.
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 2,
    }


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": row * HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "color": {"mode": "palette-classic"},
                "custom": {
                    "drawStyle": "line",
                    "lineInterpolation": "stepAfter",
                    "lineWidth": 2,
                    "showPoints": "never",
                    "spanNulls": False,
                    "scaleDistribution": panel.scale,
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [_target(panel, *line, ref) for line, ref in zip(panel.lines.items(), "ABCDEFGH", strict=False)],
    }


def _target(panel: Panel, line: str, expression: str, ref: str) -> dict[str, Any]:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": f"{panel.labels} {line}".strip(),
        "range": True,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command.parser(__doc__, out=DASHBOARD.parent).parse_args(argv)
    with command.results_folder(arguments.out, smoke=arguments.smoke) as out:
        (out / DASHBOARD.name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
