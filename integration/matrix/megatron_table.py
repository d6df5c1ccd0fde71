"""The table of Megatron's layouts, from `out/megatron.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "out" / "megatron.json"
_BRIDGES = ("mbridge", "megatron-bridge")
_LAYOUTS = {
    "one rank": "one rank",
    "dp": "DP=2",
    "tp": "TP=2 with sequence parallel",
    "pp": "PP=2",
    "vpp": "PP=2, VPP=2",
    "ep": "EP=2",
    "cp": "CP=2",
}
_MODELS = {"dense": "dense", "moe": "mixture of experts", "untied": "dense, untied"}


def table(results: Mapping[str, Any]) -> str:
    """A row for each model and layout, both bridges in it; then the causes of what did not run."""
    head = (
        "| model, layout | log-probs to transformers | skip | retry | export | resume |",
        "|---|---|---|---|---|---|",
    )
    causes = [""] if any(found["stopped"] for found in results.values()) else []
    return "\n".join([*head, *_rows(results), *causes, *_causes(results)]) + "\n"


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    names = dict.fromkeys(_split(name)[0] for name in results)
    for name in names:
        cells = [results.get(f"{name} {bridge}") for bridge in _BRIDGES]
        columns = [_figure("error"), *map(_fact, ("skip", "retry")), _figure("export"), _fact("resume")]
        yield f"| {_words(name)} | {' | '.join(_both(column, cells) for column in columns)} |"


def _both(column: Any, cells: list[Mapping[str, Any] | None]) -> str:
    words = [column(found) if found else "–" for found in cells]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def _figure(name: str) -> Any:
    return lambda found: "–" if found[name] is None else f"{found[name]:.1e}"


def _fact(name: str) -> Any:
    words = {True: "yes", False: "**no**", None: "–"}
    return lambda found: words[found[name]]


def _causes(results: Mapping[str, Any]) -> Iterator[str]:
    for name, found in results.items():
        if stopped := found["stopped"]:
            cell, bridge = _split(name)
            yield f"- {_words(cell)}, {bridge}: {stopped['because'] or stopped['error']}"


def _split(name: str) -> tuple[str, str]:
    cell, _, bridge = name.rpartition(" ")
    return cell, bridge


def _words(name: str) -> str:
    """`dense tp, offload` in words."""
    model, _, rest = name.partition(" ")
    layout, comma, option = rest.partition(", ")
    return f"{_MODELS[model]}, {_LAYOUTS[layout]}{comma}{option}"
