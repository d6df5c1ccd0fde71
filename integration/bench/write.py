"""Write the README's table of evidence from `out/evidence.json`.

    python -m integration.bench.write

A test says whether it is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EVIDENCE = Path(__file__).parent / "out" / "evidence.json"
BEGIN, END = "<!-- evidence -->\n", "<!-- /evidence -->\n"
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


def written() -> str:
    """The README as it has to be."""
    results = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    return with_table(README.read_text(encoding="utf-8"), table(results))


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
    if probe := results.get("probe"):
        yield (
            f"The probe locates {probe['unsafe_located']} of {probe['unsafe_total']} models made to leave FP16's range "
            f"by the module, with {probe['false_alarms']} false alarms on {probe['families']} families."
        )

    if scale := results.get("first_scale"):
        yield (
            f"In the demo's run, torch's first loss scale of {scale['stock']['init_scale']:g} costs "
            f"{scale['stock']['skipped']} skipped optimizer steps, the probe's {scale['probed']['init_scale']:g} costs "
            f"{scale['probed']['skipped']}."
        )


def _gradient_row(gradient: dict[str, Any], key: str, name: str) -> str:
    return f"| {name} | {' | '.join(f'{gradient[dtype][key]:.1%}' for dtype in ('bf16', 'fp16'))} |"


def with_table(text: str, table: str) -> str:
    """A page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no place for the evidence between {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table + END + after


def main() -> None:
    README.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main()
