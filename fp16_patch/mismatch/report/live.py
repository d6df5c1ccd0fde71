"""Draws what runs measure while they train, in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fp16_patch.mismatch.record.lines import (
    Coverage,
    Line,
    StandingAlert,
    alerts_of,
    attempt_of,
    coverage_of,
    metrics_of,
    time_of,
)
from fp16_patch.mismatch.report.comparison import number_text, percent_text
from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.untrusted.text import printable

HISTORY = 240
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_STEPS = 60
POLL_EVERY_S = 2.0
LONGEST_AGE_S = 365 * 86400.0
"""A line that seems to be older was written under a wrong clock."""

QUANTILES = {"p50": "abs_p50", "p90": "abs_p90", "p99": "abs_p99", "p99.9": "abs_p99_9", "max": "max_abs"}
RATIOS = {"k1": "k1", "k3": "k3", "ESS": "ess", "mean r": "is_mean"}
SHARES = frozenset({"mismatch/ess"})
"""Written as the report writes them: near the whole, what counts is how much is missing."""

Poll = Callable[[], Mapping[str, Iterable[Line]]]
"""Returns run → lines of its ``mismatch.jsonl`` and ``steps.jsonl``: the last ones again, or only the new ones."""


class SourceLost(Fp16PatchError):
    """Raised when what was watched is gone. The message is one line."""


@dataclass
class Step:
    """What is known of a step so far. Its two lines come in either order, and may come again."""

    measured: dict[str, float] = field(default_factory=dict)
    trained: dict[str, float] = field(default_factory=dict)
    coverage: Coverage | None = None
    alerts: tuple[StandingAlert, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """The step's metrics; a late correction of the mismatch wins over what the trainer wrote at the step's end."""
        return self.trained | self.measured

    def add(self, line: Line) -> None:
        coverage = coverage_of(line)
        (self.trained if coverage is None else self.measured).update(metrics_of(line))
        self.coverage = coverage or self.coverage
        self.alerts = alerts_of(line) if "alerts" in line else self.alerts


@dataclass
class View:
    """A run as it is shown: its last ``HISTORY`` steps in ascending order."""

    steps: dict[int, Step] = field(default_factory=dict)
    written: float | None = None
    attempt: str | None = None
    answers: bool = True

    def add(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self._forget_abandoned(line)
            self.steps.setdefault(line["step"], Step()).add(line)
            if (written := time_of(line)) is not None:
                self.written = max(written, self.written or 0.0)
        self.steps = dict(sorted(self.steps.items())[-HISTORY:])

    def _forget_abandoned(self, line: Line) -> None:
        """Drop the steps that a restarted trainer takes again."""
        attempt = attempt_of(line)
        if attempt is None or attempt == self.attempt:
            return
        if self.attempt is not None:
            self.steps = {number: step for number, step in self.steps.items() if number < line["step"]}
        self.attempt = attempt

    def series(self, metric: str) -> dict[int, float]:
        return {number: step.metrics[metric] for number, step in self.steps.items() if metric in step.metrics}

    def last(self, metric: str) -> float | None:
        """Return the latest value, NaN included; None if the metric was never recorded."""
        return next(reversed(self.series(metric).values()), None)

    def measured(self) -> int | None:
        """Return the latest step whose mismatch is known: its coverage and alerts are shown."""
        return next(reversed(self.series("mismatch/tokens")), None)


def watch(poll: Poll, console: Console, once: bool = False, every: float = POLL_EVERY_S) -> bool:
    """Show the runs until the user presses Ctrl-C; with ``once``, show one frame.

    Returns:
        Whether there was a step to show.

    Raises:
        SourceLost: nothing is left to watch.
    """
    views: dict[str, View] = {}
    if once:
        console.print(_polled(poll, views))
        return _anything(views)
    try:
        with Live(_frame(views), console=console, auto_refresh=False) as live:
            while True:
                live.update(_polled(poll, views), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        return _anything(views)


def _anything(views: Mapping[str, View]) -> bool:
    return any(view.steps for view in views.values())


def _polled(poll: Poll, views: dict[str, View]) -> RenderableType:
    polled = poll()
    for name, lines in polled.items():
        views.setdefault(name, View()).add(lines)
    for name, view in views.items():
        view.answers = name in polled
    return _frame(views)


def _frame(views: Mapping[str, View]) -> RenderableType:
    if not views:
        return Text("no run is here yet", style="dim")
    return Group(*(_panel(name, view) for name, view in views.items()))


def _panel(name: str, view: View) -> RenderableType:
    title = Text(printable(name if view.answers else f"{name}: over, or without an answer"))
    border = "dim" if not view.answers else "red" if _alerts(view) else "none"
    return Panel(_content(view), title=title, title_align="left", border_style=border)


def _content(view: View) -> RenderableType:
    if not view.steps:
        return Text("no step has been recorded yet", style="dim")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    for label, text in _rows(view):
        rows.add_row(label, text)
    return rows


def _rows(view: View) -> list[tuple[str, Text]]:
    gaps = [*view.series("mismatch/mean_abs").values()]
    rows = {
        "step": f"{next(reversed(view.steps))}{_age(view)}",
        "tokens": f"{number_text(view.last('mismatch/tokens'))}{_covered(view)}",
        "mean |d|": f"{_value(view, 'mismatch/mean_abs')}  {sparkline(gaps)}  {_range(gaps)}",
        "|d|": _listed(view, {label: f"mismatch/{metric}" for label, metric in QUANTILES.items()}),
        "ratios": _listed(view, {label: f"mismatch/{metric}" for label, metric in RATIOS.items()}),
        "not finite": _nonfinite(view),
        "loss scale": _loss_scale(view),
    }
    shown = [(label, Text(text)) for label, text in rows.items() if text]
    return shown + [("alert", Text(text, style="bold red")) for text in _alerts(view)]


def _age(view: View) -> str:
    age = math.nan if view.written is None else max(0.0, time.time() - view.written)
    return f"   {duration_text(round(age))} ago" if age < LONGEST_AGE_S else ""


_LESSER_UNIT = {86400: 3600, 3600: 60, 0: 1}
"""Seconds from which on a time is written down to which unit."""


def duration_text(seconds: int) -> str:
    """Write a time in its two largest units, rounded to the lesser one: 42 s, 3 min 5 s, 1 h 9 min, 2 d 4 h."""
    least = next(lesser for size, lesser in _LESSER_UNIT.items() if seconds >= size)
    seconds = round(seconds / least) * least
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    counted = {"d": days, "h": hours, "min": minutes, "s": seconds}
    return " ".join([f"{count} {unit}" for unit, count in counted.items() if count][:2]) or "0 s"


def _covered(view: View) -> str:
    number = view.measured()
    coverage = None if number is None else view.steps[number].coverage
    if coverage is None:
        return ""
    return "   complete" if coverage.complete else f"   partial: {coverage.text()}"


def _listed(view: View, metrics: Mapping[str, str]) -> str:
    return "   ".join(f"{label} {_value(view, metric)}" for label, metric in metrics.items() if view.series(metric))


def _value(view: View, metric: str) -> str:
    value = view.last(metric)
    if value is not None and math.isnan(value):
        return "NaN"
    return percent_text(value) if value is not None and metric in SHARES else number_text(value)


def _range(values: Sequence[float]) -> str:
    finite = [value for value in values[-SPARKLINE_STEPS:] if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    return f"{number_text(min(finite))} … {number_text(max(finite))} in {len(values[-SPARKLINE_STEPS:])} steps"


def _nonfinite(view: View) -> str:
    sides = {side: view.last(f"mismatch/nonfinite_{side}") for side in ("sampler", "learner")}
    listed = ", ".join(f"{number_text(count)} tokens of the {side}" for side, count in sides.items() if count)
    certain = view.last("mismatch/nonfinite_certain")
    return f"{listed}, {number_text(certain)} of them certain, which is harmless" if certain else listed


def _loss_scale(view: View) -> str:
    if view.last("fp16/loss_scale") is None:
        return ""
    skipped, in_a_row = view.last("fp16/skipped_total"), view.last("fp16/consecutive_skips")
    return (
        number_text(view.last("fp16/loss_scale"))
        + (f"   {number_text(skipped)} steps skipped" if skipped is not None else "")
        + (f", the last {number_text(in_a_row)} in a row" if in_a_row else "")
    )


def _alerts(view: View) -> list[str]:
    number = view.measured()
    return [
        f"▲ {alert.name} {number_text(alert.value)}, threshold {number_text(alert.threshold)}, since step {alert.since}"
        for alert in (() if number is None else view.steps[number].alerts)
    ]


def sparkline(values: Sequence[float]) -> str:
    """Draw the last values as bars between the least and the greatest; a blank stands for one that is not finite."""
    shown = values[-SPARKLINE_STEPS:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    least, spread = min(finite), max(finite) - min(finite)
    return "".join(_spark((value - least) / spread if spread else 0.5) for value in shown)


def _spark(share: float) -> str:
    return SPARKS[min(len(SPARKS) - 1, int(share * len(SPARKS)))] if math.isfinite(share) else " "
