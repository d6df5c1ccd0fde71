"""The evidence as one self-contained page: `out/evidence.html`, drawn from `out/evidence.json`.

python -m integration.bench.page
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.report.charts import Axis, Chart, Line, Scale
from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.report.rendering import render
from fp16_patch.mismatch.report.tables import Row, Table
from integration.bench.write import KINDS, SHARES, sanity_setting, sanity_verdict

OUT = Path(__file__).parent / "out"
TEMPLATE = Path(__file__).with_name("page.html.j2")
PAIRS = tuple(f"{learner}/{sampler}" for learner in ("fp32", "fp16", "bf16") for sampler in ("fp32", "fp16", "bf16"))
LABELS = {"reward": "mean reward", "mean_abs": "mean |d| (nats)", "grad_norm": "gradient norm"}
# Averaged over so many steps: a step's reward is of a few dozen responses.
WINDOW = 5

# By step; None where a step has no value.
Curve = Sequence[float | None]


@dataclass(frozen=True)
class Section:
    """What was measured by one bench: a sentence, a table and charts, as far as it has them."""

    title: str
    note: str = ""
    table: Table | None = None
    charts: Sequence[Chart] = ()


def page(results: Mapping[str, Any]) -> str:
    """Return one page that needs no network and no other file; a section that was not measured is left out."""
    drawn = {"offline": offline, "gradient": gradient, "synthetic": synthetic, "sanity": sanity, "ablation": ablation}
    sections = [draw(results[key]) for key, draw in drawn.items() if results.get(key)]
    title = "Training and inference in one precision, in miniature"
    # No runs for the page as a whole: each section has arms of its own.
    return render(TEMPLATE, title=title, sections=sections, runs=[])


def offline(found: Mapping[str, Any]) -> Section:
    kinds = {kind: name for kind, name in KINDS.items() if kind in found}
    rows = [
        Row(
            name,
            [
                *(number_text(found[kind][pair]["mean_abs"]) for pair in PAIRS),
                f"{found[kind]['bf16 ÷ fp16']['ratio']:.1f}",
            ],
        )
        for kind, name in kinds.items()
    ]
    table = Table(["model", *PAIRS, "bf16 ÷ fp16"], rows)
    return Section("Offline: mean |d| of every pair, learner/sampler", table=table)


def gradient(found: Mapping[str, Any]) -> Section:
    dtypes = [name for name in ("fp32", "fp16", "bf16") if name in found]
    rows = [Row(name, [f"{found[dtype][key]:.1%}" for dtype in dtypes]) for key, name in SHARES.items()]
    table = Table(["share of the gradient's norm", *dtypes], rows)
    return Section("What the mismatch does to the policy gradient", table=table)


def synthetic(found: Mapping[str, Any]) -> Section:
    settings = found["settings"]
    note = (
        f"Products with operands of {settings['bits']} mantissa bits: no real hardware computes so, and the mismatch "
        f"is far larger than BF16's. Seeds {_listed(found['seeds'])}."
    )
    curves = {arm: {seed: run["curves"] for seed, run in runs.items()} for arm, runs in found["arms"].items()}
    charts = [
        over_seeds("Reward", curves, "reward", settings["window"]),
        over_seeds("Mean |d| of a token", curves, "mean_abs", settings["window"]),
    ]
    return Section("Synthetic: the mechanism alone", note, charts=charts)


def sanity(found: Mapping[str, Any]) -> Section:
    note = f"{sanity_setting(found)}. {sanity_verdict(found)}"
    return Section("Sanity run on real verl", note, _sanity_table(found), [*_sanity_charts(found)])


def _sanity_table(found: Mapping[str, Any]) -> Table:
    head = ("algorithm", "seeds", "mean |d| bf16", "fp16", "bf16 ÷ fp16, by seed", "reward bf16", "reward fp16")
    return Table(head, [Row(name, _sanity_cells(summary)) for name, summary in found["summary"].items()])


def _sanity_cells(summary: Mapping[str, Any]) -> list[str]:
    ratios = summary["bf16 ÷ fp16"]
    return [
        ", ".join(ratios),
        *(number_text(summary[arm]["mean_abs"]["mean"]) for arm in ("bf16", "fp16")),
        ", ".join(f"{ratio:.1f}" for ratio in ratios.values()),
        *(f"{summary[arm]['reward']['mean']:.2f}" for arm in ("bf16", "fp16")),
    ]


def _sanity_charts(found: Mapping[str, Any]) -> Iterator[Chart]:
    for algorithm, arms in found["algorithms"].items():
        curves = {arm: {seed: run["curves"] for seed, run in runs.items()} for arm, runs in arms.items()}
        for figured, title in (
            ("reward", "reward"),
            ("mean_abs", "mean |d| of a token"),
            ("grad_norm", "gradient norm"),
        ):
            yield over_seeds(f"{algorithm}: {title}", curves, figured, WINDOW if figured == "reward" else 1)


def ablation(found: Mapping[str, Any]) -> Section:
    pairs = found["pairs"]
    rows = [
        Row(
            pair,
            [
                number_text(run["mean_abs"]),
                number_text(run["last_quarter"]["mean_abs"]),
                f"{run['last_quarter']['reward']:.2f}",
            ],
        )
        for pair, run in pairs.items()
    ]
    head = ("learner/sampler", "mean |d|", "last quarter of steps", "reward there")
    charts = [
        over_seeds(title, {pair: {"": run["curves"]} for pair, run in pairs.items()}, figured, 1)
        for figured, title in (("mean_abs", "Mean |d| of a token"), ("reward", "Reward"))
    ]
    return Section("Ablation on real verl: learner and sampler apart", table=Table(head, rows), charts=charts)


def over_seeds(title: str, curves: Mapping[str, Mapping[str, Any]], figured: str, window: int) -> Chart:
    """Draw a line an arm, the mean over its seeds, in a band from the least to the greatest of them."""
    lines, bands = [], []
    for style, (name, by_seed) in enumerate(curves.items()):
        known = [averaged(run[figured], window) for run in by_seed.values()]
        low, middle, high = (
            Line(name, style, {step: of([points[step] for points in known]) for step in _shared(known)})
            for of in (min, statistics.fmean, max)
        )
        lines.append(middle)
        bands += [(low, high)] if len(known) > 1 else []
    values = [value for line in lines for value in line.points.values()]
    captions = [f"Means over {window} steps." if window > 1 else "", "Band: from seed to seed." if bands else ""]
    y = Axis(LABELS[figured], _scale(figured, values))
    return Chart(title, lines, Axis("step", whole=True), y, " ".join(filter(None, captions)), tuple(bands))


def averaged(curve: Curve, window: int) -> dict[float, float]:
    """Map each step to the mean of the last ``window`` ones, from the step on at which there are so many."""
    stretches = {end: curve[end - window : end] for end in range(window, len(curve) + 1)}
    known = {end: [value for value in stretch if value is not None] for end, stretch in stretches.items()}
    return {float(end): statistics.fmean(values) for end, values in known.items() if values}


def _shared(known: Sequence[Mapping[float, float]]) -> list[float]:
    return sorted(set.intersection(*(set(points) for points in known)))


def _scale(figured: str, values: Sequence[float]) -> Scale:
    # A reference that is exact has no place among decades.
    return "log" if figured == "mean_abs" and max(values, default=0) > 0 else "linear"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    drawn = page(json.loads((out / "evidence.json").read_text(encoding="utf-8")))
    (out / "evidence.html").write_text(drawn, encoding="utf-8")
    print(out / "evidence.html")


if __name__ == "__main__":
    main()
