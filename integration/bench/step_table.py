"""The table of what overflows, an optimizer step and a weight sync cost, from `out/step.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = ("| | verl's own | with `fp16_patch` |", "|---|---|---|")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: what was measured beside verl's own way, then the optimizer phase by size."""
    return "\n".join([*HEAD, *_rows(results), "", *_phase(results.get("sizes", {}))]) + "\n"


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    if "lost_stock" in results:
        planted = f"{results['updates']} updates with {results['planted']} planted overflows"
        yield _row(f"mini-batches lost in {planted}", results["lost_stock"], results["lost_ours"])
        starts = results["calibration_skips_stock"], results["calibration_skips_ours"]
        yield _row("mini-batches lost before the first step that is taken", *starts)
        same = "the same to the last bit" if results["retry_bitwise"] else "another one"
        yield _row(
            "a step that was tried again, compared with one at that scale from the start (one rank, two ranks)",
            "–",
            same,
        )
    if "passes_stock" in results:
        yield _row(
            "passes over the gradients in an FP16 step", f"{results['passes_stock']:g}", f"{results['passes_ours']:g}"
        )
        yield _row("passes over the gradients in a BF16 step", f"{results['passes_stock_bf16']:g}", "–")
    if "wire_bytes_ratio" in results:
        same = "the same to the last bit" if results["sampler_bitwise"] else "others"
        yield _row("bytes of a weight sync", "1", f"{results['wire_bytes_ratio']:g}")
        yield _row("the sampler's weights after the sync", "–", same)
    for device, ratios in results.get("step_ratio", {}).items():
        for size, ratio in ratios.items():
            yield _row(f"a whole FP16 step ÷ a BF16 step, {size} parameters, {device}", "–", f"{ratio:.2f}")


def _row(what: str, stock: Any, ours: Any) -> str:
    return f"| {what} | {stock} | {ours} |"


def _phase(sizes: Mapping[str, Any]) -> Iterator[str]:
    if not sizes:
        return
    arms = list(next(iter(sizes.values()))["arms"])
    yield f"| optimizer phase, time ÷ BF16 as verl steps | {' | '.join(arms[1:])} |"
    yield "|---|" + "---|" * (len(arms) - 1)
    for found in sizes.values():
        ratios = [f"{found['ratios']['optimizer'][arm]:.2f}" for arm in arms[1:]]
        yield f"| {found['parameters'] / 1e6:.0f} M parameters | {' | '.join(ratios)} |"
