"""Write the tables of measured figures into the pages, from the results in `out/`.

    python -m integration.bench.write

Only tables are written, each between its two marks; the prose around them is written by hand. A test says whether the
pages are up to date.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from integration.bench import faults_table, monitor_table, step_table
from integration.pages.places import with_table

ROOT = Path(__file__).parents[2]
BENCH_PAGE = ROOT / "integration" / "README.md"
SCALING_PAGE = ROOT / "fp16_patch" / "scaling" / "README.md"
MONITOR_PAGE = ROOT / "fp16_patch" / "mismatch" / "README.md"
EVIDENCE = Path(__file__).parent / "out" / "evidence.json"
STEP = EVIDENCE.with_name("step.json")
MONITOR = EVIDENCE.with_name("monitor.json")
FAULTS = EVIDENCE.with_name("faults.json")
READING = EVIDENCE.with_name("reading.json")
KINDS = {
    "dense": "the demo's model, 1.35 M parameters, trained to add",
    "lora": "with adapters of rank 32, alpha 64",
    "lora_rank1": "with adapters of rank 1, alpha 2",
    "moe": "mixture of 4 experts, two a token, trained to add",
}
HEAD = (
    "| model | fp32/fp32 | bf16/bf16 | fp16/fp16 | fp32 learner, bf16 sampler | bf16 ÷ fp16 [95 %] |",
    "|---|---|---|---|---|---|",
)

GRADIENT_HEAD = ("| share of the policy gradient's norm, first model | bf16 | fp16 |", "|---|---|---|")
SHARES = {
    "precision_error": "error of rounding",
    "importance_effect": "effect of exact importance weights of sequences: what mismatch distorts",
    "sampling_noise": "noise of a batch of 64 responses",
}

SYNTHETIC = {
    "fp32": "FP32 on both sides",
    "same rounding": "the same coarse rounding on both sides: low precision, no mismatch",
    "other rounding": "equally coarse roundings that differ: the same precision, mismatch",
    "fp32 learner": "an FP32 learner, the coarse sampler: more precision, mismatch",
}
SYNTHETIC_HEAD = ("| synthetic | mean \\|d\\| | reward at first | at the end, of {seeds} seeds |", "|---|---|---|---|")
MODES = ("fp32", "fp16", "bf16")
SANITY_HEAD = (
    "| algorithm, by verl's own settings | mean \\|d\\| bf16 | fp16 | bf16 ÷ fp16, by seed "
    "| reward at the end bf16 | fp16 | fp16 − bf16 | from seed to seed |",
    "|---|---|---|---|---|---|---|---|",
)

Table = Callable[[Mapping[str, Any]], Iterable[str]]


@dataclass(frozen=True)
class Place:
    """Where a table goes, and what it is made of.

    Attributes:
        section: the part of the results it shows; None for all of them. A section that is not there is an empty table.
    """

    page: Path
    results: Path
    section: str | None
    rows: Table

    def table(self) -> str:
        results = json.loads(self.results.read_text(encoding="utf-8"))
        shown = results if self.section is None else results.get(self.section)
        return lines(self.rows(shown)) if shown else ""


def lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def written() -> dict[Path, str]:
    """Every page with measured tables, as it has to be."""
    pages: dict[Path, str] = {}
    for name, place in PLACES.items():
        text = pages.get(place.page) or place.page.read_text(encoding="utf-8")
        pages[place.page] = with_table(text, place.table(), name)
    return pages


def offline(found: Mapping[str, Any]) -> Iterator[str]:
    """Mean |d| by learner/sampler of every kind of model that was measured."""
    yield from HEAD
    yield from (_offline_row(name, found[kind]) for kind, name in KINDS.items() if kind in found)


def _offline_row(name: str, found: Mapping[str, Any]) -> str:
    pairs = ("fp32/fp32", "bf16/bf16", "fp16/fp16", "fp32/bf16")
    low, high = found["bf16 ÷ fp16"]["interval"]
    gain = f"**{found['bf16 ÷ fp16']['ratio']:.1f}** [{low:.1f} – {high:.1f}]"
    return f"| {name} | {' | '.join(format(found[pair]['mean_abs'], '.1e') for pair in pairs)} | {gain} |"


def gradient(found: Mapping[str, Any]) -> Iterator[str]:
    yield from GRADIENT_HEAD
    for key, name in SHARES.items():
        yield f"| {name} | {' | '.join(f'{found[dtype][key]:.1%}' for dtype in ('bf16', 'fp16'))} |"


def probe(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| the probe, on small models | |", "|---|---|")
    located = f"{found['unsafe_located']} of {found['unsafe_total']}"
    yield f"| models made to leave FP16's range: the module where it begins was named | {located} |"
    alarms = f"{found['false_alarms']} of {found['families']}"
    yield f"| families of models that stay in FP16's range: false alarms | {alarms} |"


def first_scale(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| first loss scale of the demo's run | | optimizer steps skipped |", "|---|---|---|")
    for key, name in (("stock", "torch's"), ("probed", "the probe's")):
        yield f"| {name} | {found[key]['init_scale']:g} | {found[key]['skipped']} |"


def synthetic(found: Mapping[str, Any]) -> Iterator[str]:
    head, rule = SYNTHETIC_HEAD
    yield from (head.format(seeds=len(found["seeds"])), rule)
    yield from (_synthetic_row(name, found["summary"][arm]) for arm, name in SYNTHETIC.items())


def _synthetic_row(name: str, summary: Mapping[str, Any]) -> str:
    end = "**{mean:.2f}** ({min:.2f} – {max:.2f})".format(**summary["final_reward"])
    gap = summary["mean_abs"]["mean"]
    return f"| {name} | {f'{gap:.1e}' if gap else '0'} | {summary['start_reward']['mean']:.2f} | {end} |"


def sanity(found: Mapping[str, Any]) -> Iterator[str]:
    yield from SANITY_HEAD
    yield from (_sanity_row(name, summary) for name, summary in found["summary"].items())


def _sanity_row(name: str, summary: Mapping[str, Any]) -> str:
    gaps, rewards = (
        [format(summary[arm][figure]["mean"], code) for arm in ("bf16", "fp16")]
        for figure, code in (("mean_abs", ".1e"), ("reward", ".2f"))
    )
    ratios = summary["bf16 ÷ fp16"]
    listed = ", ".join(f"**{ratio:.1f}**" for ratio in ratios.values())
    spread = _spread(summary) if len(ratios) > 1 else "–"
    return f"| {name} | {' | '.join([*gaps, listed, *rewards])} | {summary['reward_difference']:+.2f} | {spread} |"


def _spread(summary: Mapping[str, Any]) -> str:
    ends = ((arm, summary[arm]["reward"]) for arm in ("bf16", "fp16"))
    return ", ".join(f"{arm} {reward['min']:.2f} – {reward['max']:.2f}" for arm, reward in ends)


def ablation(found: Mapping[str, Any]) -> Iterator[str]:
    """Rows are learners, columns samplers; a pair that was not run is a dash."""
    pairs = found["pairs"]
    yield f"| mean \\|d\\| in training, learner by sampler | {' | '.join(f'{name} sampler' for name in MODES)} |"
    yield f"|{'---|' * (len(MODES) + 1)}"
    for learner in MODES:
        known = (pairs.get(f"{learner}/{sampler}") for sampler in MODES)
        cells = ("–" if run is None else f"{run['mean_abs']:.1e}" for run in known)
        yield f"| {learner} learner | {' | '.join(cells)} |"


def sanity_setting(found: Mapping[str, Any]) -> str:
    """What was run, as the page of plots says it."""
    problems = found["problems"]
    return (
        f"Real verl, {found['settings']['steps']} steps on the {problems['kept']} of {problems['drawn']} problems that "
        f"the model solves {problems['low']:.0%} to {problems['high']:.0%} of the time before; between BF16 and FP16 "
        "nothing differs but the precision"
    )


def sanity_verdict(found: Mapping[str, Any]) -> str:
    """What the rewards say and what the mismatch says, as the page of plots says it."""
    repeated = {name: s for name, s in found["summary"].items() if s["reward_separates"] is not None}
    sentences = [_rewards_of(name, summary) for name, summary in repeated.items()]
    single = [s["reward_difference"] for name, s in found["summary"].items() if name not in repeated]
    if single:
        sentences.append(
            f"Of the algorithms of one seed FP16's reward differs from BF16's by {min(single):+.2f} to "
            f"{max(single):+.2f}."
        )
    return " ".join(sentences)


def _rewards_of(name: str, summary: Mapping[str, Any]) -> str:
    ranges = " and ".join(
        f"{arm.upper()} {summary[arm]['reward']['min']:.2f} to {summary[arm]['reward']['max']:.2f}"
        for arm in ("bf16", "fp16")
    )
    seeds, ratio = len(summary["bf16 ÷ fp16"]), summary["ratio"]
    overlap = _without_overlap(seeds) if summary["reward_separates"] else "and the ranges overlap"
    return (
        f"The reward does not decide between the two at this size ({name}, {seeds} seeds: {ranges}, {overlap}); the "
        f"mismatch does, by {ratio['min']:.1f} to {ratio['max']:.1f} times."
    )


def _without_overlap(seeds: int) -> str:
    """Two arms of n runs lie apart in 2 of the C(2n, n) orders in which they can come."""
    return f"without overlap, as happens by chance in {2 / comb(2 * seeds, seeds):.0%} of such comparisons"


PLACES = {
    "offline": Place(BENCH_PAGE, EVIDENCE, "offline", offline),
    "gradient": Place(BENCH_PAGE, EVIDENCE, "gradient", gradient),
    "probe": Place(BENCH_PAGE, EVIDENCE, "probe", probe),
    "first scale": Place(BENCH_PAGE, EVIDENCE, "first_scale", first_scale),
    "synthetic": Place(BENCH_PAGE, EVIDENCE, "synthetic", synthetic),
    "sanity": Place(BENCH_PAGE, EVIDENCE, "sanity", sanity),
    "ablation": Place(BENCH_PAGE, EVIDENCE, "ablation", ablation),
    "step": Place(SCALING_PAGE, STEP, None, lambda results: step_table.table(results).splitlines()),
    "monitor": Place(MONITOR_PAGE, MONITOR, None, monitor_table.rows),
    "causes": Place(MONITOR_PAGE, MONITOR, "causes", monitor_table.causes),
    "faults": Place(BENCH_PAGE, FAULTS, None, faults_table.rows),
    "reading": Place(MONITOR_PAGE, READING, None, faults_table.reading),
}


def main() -> None:
    for page, text in written().items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
