"""Reading a page that was written: its elements, and the figures that its script draws."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

MOST_BYTES = 6_000_000
PLOTLY_AT_LEAST = 1_000_000


class Elements(HTMLParser):
    """The tags that are open at the end, every (tag, attributes) on the way, and the content of every script."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.figures: list[tuple[str, dict[str, Any]]] = []
        self._label = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.seen.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if attributes.get("class") == "plot":
            self._label = attributes["aria-label"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "script" and self.seen[-1] == ("script", {"type": "application/json"}):
            self.figures.append((self._label, json.loads(self.scripts[-1], parse_constant=_no_constant)))


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


@dataclass
class Page:
    """A page: as a whole, and ``own``, without the one script that is Plotly's; figures with their labels."""

    whole: str
    own: str
    open: list[str]
    seen: list[tuple[str, dict[str, str | None]]]
    figures: list[tuple[str, dict[str, Any]]] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls.of(path.read_text(encoding="utf-8"))

    @classmethod
    def of(cls, whole: str) -> Page:
        elements = Elements(whole)
        (plotly,) = [script for script in elements.scripts if len(script) > PLOTLY_AT_LEAST]
        return cls(whole, whole.replace(plotly, ""), elements.open, elements.seen, elements.figures)

    def traces(self, chart: str, run: str) -> list[dict[str, Any]]:
        """The run's traces in the chart of that title, areas left out."""
        (figure,) = [figure for label, figure in self.figures if label == chart]
        return [
            trace for trace in figure["data"] if trace.get("legendgroup") == run and trace.get("hoverinfo") != "skip"
        ]

    def points(self, chart: str, run: str) -> dict[Any, float]:
        """x → y of the run's first line in the chart."""
        trace = self.traces(chart, run)[0]
        return dict(zip(trace["x"], trace["y"], strict=True))

    def texts(self, chart: str, run: str) -> dict[Any, str]:
        """x → what stands at a mark there."""
        (trace,) = [trace for trace in self.traces(chart, run) if "text" in trace]
        return dict(zip(trace["x"], trace["text"], strict=True))
