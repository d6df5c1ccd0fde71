"""Write the README's tables of evidence from `out/evidence.json` and `out/step.json`.

    python -m integration.bench.write

A test says whether it is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import comb
from pathlib import Path
from typing import Any

from integration.bench import step_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EVIDENCE = Path(__file__).parent / "out" / "evidence.json"
STEP = EVIDENCE.with_name("step.json")
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
    "| algorithm, by verl's own settings | mean \\|d\\| bf16 | fp16 | bf16 ÷ fp16 | reward at the end bf16 | fp16 |",
    "|---|---|---|---|---|---|",
)


def written() -> str:
    """The README as it has to be."""
    page = README.read_text(encoding="utf-8")
    for place, results, table_of in (("evidence", EVIDENCE, table), ("step", STEP, step_table.table)):
        page = with_table(page, table_of(json.loads(results.read_text(encoding="utf-8"))), place)
    return page


def table(results: dict[str, Any]) -> str:
    """Markdown: mean |d| by learner/sampler of every kind of model that was measured, then the other sections."""
    rows = [_row(name, found) for kind, name in KINDS.items() if (found := results.get("offline", {}).get(kind))]
    return "\n".join([*HEAD, *rows, "", *_sentences(results)]) + "\n"


def _row(name: str, found: dict[str, Any]) -> str:
    pairs = ("fp32/fp32", "bf16/bf16", "fp16/fp16", "fp32/bf16")
    low, high = found["bf16 ÷ fp16"]["interval"]
    gain = f"**{found['bf16 ÷ fp16']['ratio']:.1f}** [{low:.1f} – {high:.1f}]"
    return f"| {name} | {' | '.join(format(found[pair]['mean_abs'], '.1e') for pair in pairs)} | {gain} |"


def _sentences(results: dict[str, Any]) -> Iterator[str]:
    if gradient := results.get("gradient"):
        yield from (*GRADIENT_HEAD, *(_gradient_row(gradient, *named) for named in SHARES.items()), "")
        if all(gradient[dtype]["sampling_noise"] > gradient[dtype]["importance_effect"] for dtype in ("bf16", "fp16")):
            yield from ("At this size the noise of sampling hides both of the others.", "")
    if probe := results.get("probe"):
        yield (
            f"The probe locates {probe['unsafe_located']} of {probe['unsafe_total']} models made to leave FP16's range "
            f"by the module, with {probe['false_alarms']} false alarms on {probe['families']} families."
        )

    scale = results.get("first_scale")
    if scale and scale["stock"]["init_scale"] != scale["probed"]["init_scale"]:
        yield (
            f"In the demo's run, torch's first loss scale of {scale['stock']['init_scale']:g} costs "
            f"{scale['stock']['skipped']} skipped optimizer steps, the probe's {scale['probed']['init_scale']:g} costs "
            f"{scale['probed']['skipped']}."
        )
    if synthetic := results.get("synthetic"):
        yield from ("", *_synthetic(synthetic))
    if sanity := results.get("sanity"):
        yield from ("", *_sanity(sanity))
    if ablation := results.get("ablation"):
        yield from ("", *_ablation(ablation))


def _synthetic(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Why it matters, where it can be seen: products with operands of {found['settings']['bits']} mantissa bit, "
        f"which no hardware has, and plain policy gradient for {found['settings']['steps']} steps. The second row and "
        "the third differ in the mismatch alone:"
    )
    head, rule = SYNTHETIC_HEAD
    rows = (_synthetic_row(name, found["summary"][arm]) for arm, name in SYNTHETIC.items())
    yield from ("", head.format(seeds=len(found["seeds"])), rule, *rows)


def _synthetic_row(name: str, summary: dict[str, Any]) -> str:
    end = "**{mean:.2f}** ({min:.2f} – {max:.2f})".format(**summary["final_reward"])
    gap = summary["mean_abs"]["mean"]
    return f"| {name} | {f'{gap:.1e}' if gap else '0'} | {summary['start_reward']['mean']:.2f} | {end} |"


def _sanity(found: dict[str, Any]) -> Iterator[str]:
    rows = (_sanity_row(name, summary) for name, summary in found["summary"].items())
    yield from (f"{sanity_setting(found)} (`make bench-full`):", "", *SANITY_HEAD, *rows, "", sanity_verdict(found))


def sanity_setting(found: Mapping[str, Any]) -> str:
    problems = found["problems"]
    return (
        f"Real verl, {found['settings']['steps']} steps on the {problems['kept']} of {problems['drawn']} problems that "
        f"the model solves {problems['low']:.0%} to {problems['high']:.0%} of the time before; between BF16 and FP16 "
        "nothing differs but the precision"
    )


def sanity_verdict(found: Mapping[str, Any]) -> str:
    """What the rewards say and what the mismatch says."""
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


def _sanity_row(name: str, summary: dict[str, Any]) -> str:
    gaps, rewards = (
        [format(summary[arm][figure]["mean"], code) for arm in ("bf16", "fp16")]
        for figure, code in (("mean_abs", ".1e"), ("reward", ".2f"))
    )
    ratios = ", ".join(f"**{ratio:.1f}**" for ratio in summary["bf16 ÷ fp16"].values())
    return f"| {name} | {' | '.join([*gaps, ratios, *rewards])} |"


def _ablation(found: dict[str, Any]) -> Iterator[str]:
    """Rows are learners, columns samplers; a pair that was not run is a dash."""
    pairs = found["pairs"]
    yield f"| mean \\|d\\| in training, learner by sampler | {' | '.join(f'{name} sampler' for name in MODES)} |"
    yield f"|{'---|' * (len(MODES) + 1)}"
    for learner in MODES:
        known = (pairs.get(f"{learner}/{sampler}") for sampler in MODES)
        cells = ("–" if run is None else f"{run['mean_abs']:.1e}" for run in known)
        yield f"| {learner} learner | {' | '.join(cells)} |"


def _gradient_row(gradient: dict[str, Any], key: str, name: str) -> str:
    return f"| {name} | {' | '.join(f'{gradient[dtype][key]:.1%}' for dtype in ('bf16', 'fp16'))} |"


def with_table(text: str, table: str, place: str = "evidence") -> str:
    """The page with the table where `<!-- place -->` … `<!-- /place -->` are.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {place} -->\n", f"<!-- /{place} -->\n"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"no place for the {place} between {begin.strip()} and {end.strip()}")
    return before + begin + table + end + after


def main() -> None:
    README.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main()
