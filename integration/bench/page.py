"""The evidence as one self-contained page: `out/evidence.html`, drawn from `out/evidence.json`.

python -m integration.bench.page
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.report.axis import Axis, decade_axis, linear_axis
from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.report.figure import Chart, Line, band, figure
from fp16_patch.mismatch.report.page import STYLE
from fp16_patch.mismatch.report.tables import html_row, html_table
from integration.bench.write import KINDS, SHARES, sanity_setting, sanity_verdict

OUT = Path(__file__).parent / "out"
PAIRS = tuple(f"{learner}/{sampler}" for learner in ("fp32", "fp16", "bf16") for sampler in ("fp32", "fp16", "bf16"))
LABELS = {"reward": "mean reward", "mean_abs": "mean |d| (nats)", "grad_norm": "gradient norm"}
# Averaged over so many steps: a step's reward is of a few dozen responses.
WINDOW = 5

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
{style}</style></head><body><main>
<h1>{title}</h1><p class="soft">d = log π<sub>learner</sub> − log μ<sub>sampler</sub> of each sampled token,
Σd its sum over a sequence. Point at a mark to read its value.</p>
{sections}
</main></body></html>
"""

# By step; None where a step has no value.
Curve = Sequence[float | None]


def page(results: Mapping[str, Any]) -> str:
    """One page that needs no network and no script; a section that was not measured is left out."""
    sections = {
        "Offline: mean |d| of every pair, learner/sampler": ("offline", offline),
        "What the mismatch does to the policy gradient": ("gradient", gradient),
        "Synthetic: the mechanism alone": ("synthetic", synthetic),
        "Sanity run on real verl": ("sanity", sanity),
        "Ablation on real verl: learner and sampler apart": ("ablation", ablation),
    }
    shown = (f"<h2>{title}</h2>{draw(results[key])}" for title, (key, draw) in sections.items() if results.get(key))
    style = STYLE.read_text(encoding="utf-8")
    return PAGE.format(
        title="Training and inference in one precision, in miniature", style=style, sections="".join(shown)
    )


def offline(found: Mapping[str, Any]) -> str:
    kinds = {kind: name for kind, name in KINDS.items() if kind in found}
    rows = (
        html_row(
            name,
            [
                *(number_text(found[kind][pair]["mean_abs"]) for pair in PAIRS),
                f"{found[kind]['bf16 ÷ fp16']['ratio']:.1f}",
            ],
        )
        for kind, name in kinds.items()
    )
    return html_table(["model", *PAIRS, "bf16 ÷ fp16"], rows)


def gradient(found: Mapping[str, Any]) -> str:
    dtypes = [name for name in ("fp32", "fp16", "bf16") if name in found]
    rows = (html_row(name, [f"{found[dtype][key]:.1%}" for dtype in dtypes]) for key, name in SHARES.items())
    return html_table(["share of the gradient's norm", *dtypes], rows)


def synthetic(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    caption = (
        f"Products with operands of {settings['bits']} mantissa bits: no real hardware computes so, and the mismatch "
        f"is far larger than BF16's. Seeds {_listed(found['seeds'])}."
    )
    curves = {arm: {seed: run["curves"] for seed, run in runs.items()} for arm, runs in found["arms"].items()}
    charts = [
        over_seeds("Reward", curves, "reward", settings["window"]),
        over_seeds("Mean |d| of a token", curves, "mean_abs", settings["window"]),
    ]
    return f'<p class="soft">{escape(caption)}</p>{_grid(charts)}'


def sanity(found: Mapping[str, Any]) -> str:
    said = f"{sanity_setting(found)}. {sanity_verdict(found)}"
    return f'<p class="soft">{escape(said)}</p>{_sanity_table(found)}{_grid(_sanity_charts(found))}'


def _sanity_table(found: Mapping[str, Any]) -> str:
    head = ("algorithm", "seeds", "mean |d| bf16", "fp16", "bf16 ÷ fp16, by seed", "reward bf16", "reward fp16")
    return html_table(head, (html_row(name, _sanity_cells(summary)) for name, summary in found["summary"].items()), "")


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


def ablation(found: Mapping[str, Any]) -> str:
    pairs = found["pairs"]
    rows = (
        html_row(
            pair,
            [
                number_text(run["mean_abs"]),
                number_text(run["last_quarter"]["mean_abs"]),
                f"{run['last_quarter']['reward']:.2f}",
            ],
        )
        for pair, run in pairs.items()
    )
    head = ("learner/sampler", "mean |d|", "last quarter of steps", "reward there")
    charts = [
        over_seeds(title, {pair: {"": run["curves"]} for pair, run in pairs.items()}, figured, 1)
        for figured, title in (("mean_abs", "Mean |d| of a token"), ("reward", "Reward"))
    ]
    return html_table(head, rows) + _grid(charts)


def over_seeds(title: str, curves: Mapping[str, Mapping[str, Any]], figured: str, window: int) -> Chart:
    """A line an arm, the mean over its seeds; the band around it is from the least to the greatest of them."""
    lines, bands = [], []
    for style, (name, by_seed) in enumerate(curves.items()):
        known = [averaged(run[figured], window) for run in by_seed.values()]
        low, middle, high = (
            Line(name, style, {step: of([points[step] for points in known]) for step in _shared(known)})
            for of in (min, statistics.fmean, max)
        )
        lines.append(middle)
        bands += [(low, high)] if len(known) > 1 else []
    values = [value for ends in (lines, *bands) for line in ends for value in line.points.values()]
    x = linear_axis("step", [step for line in lines for step in line.points] or [0, 1], snug=True, whole=True)
    y = _axis(figured, values or [0, 1])
    captions = [f"Means over {window} steps." if window > 1 else "", "Band: from seed to seed." if bands else ""]
    extras = "".join(band(x, y, *pair) for pair in bands)
    return Chart(title, lines, x, y, " ".join(filter(None, captions)), extras)


def averaged(curve: Curve, window: int) -> dict[float, float]:
    """Step → the mean of the last ``window`` steps, from the step on at which there are so many."""
    stretches = {end: curve[end - window : end] for end in range(window, len(curve) + 1)}
    known = {end: [value for value in stretch if value is not None] for end, stretch in stretches.items()}
    return {float(end): statistics.fmean(values) for end, values in known.items() if values}


def _shared(known: Sequence[Mapping[float, float]]) -> list[float]:
    return sorted(set.intersection(*(set(points) for points in known)))


def _axis(figured: str, values: Sequence[float]) -> Axis:
    # A reference that is exact has no place among decades.
    small = figured == "mean_abs" and max(values) > 0
    return decade_axis(LABELS[figured], values) if small else linear_axis(LABELS[figured], values)


def _grid(charts: Iterable[Chart]) -> str:
    return f'<div class="charts">{"".join(map(figure, charts))}</div>'


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
