"""Tells which weights a sampler keeps in another dtype than the plan's; a learner may round only the others.

Sampler and learner call a weight differently where the sampler joins several, so both go by the end of its name. What
cannot be told apart so stays in the dtype that it has: the sampler rounds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# `parameters` and `buffers` → ends of their names, sorted
Kept = dict[str, list[str]]
# Kinds of processes that hold a sampler's model, once it is loaded.
_SAMPLING = ("sampler_worker", "sglang_scheduler")


def end_of(name: str) -> str:
    """Return the last two parts of a weight's name: `gate.weight` of `model.layers.3.mlp.gate.weight`."""
    return ".".join(name.split(".")[-2:])


def stays(name: str, kept: Kept) -> bool:
    """Return whether a weight may be one of those that the sampler keeps."""
    return end_of(name) in kept["parameters"] or end_of(name) in kept["buffers"]


def unmatched(kept: Kept, sent_ends: Collection[str]) -> list[str]:
    """List the kept parameters that no sent weight matches; buffers are mostly the sampler's own."""
    return [end for end in kept["parameters"] if end not in sent_ends]


def kept_by_samplers(records: Sequence[Mapping[str, Any]], role: str = "rollout") -> Kept | None:
    """Return what any of this role's samplers keeps; None if one of them has not said so."""
    samplers = [record for record in records if _may_sample(record, role)]
    if not samplers or any(role not in record.get("keeps", {}) for record in samplers):
        return None
    return {kind: sorted(_ends(samplers, role, kind)) for kind in ("parameters", "buffers")}


def _may_sample(record: Mapping[str, Any], role: str) -> bool:
    holding = {each for each, row in record["roles"].items() if "engine_weight" in row}
    return role in holding or (record["kind"] in _SAMPLING and not holding)


def _ends(samplers: Iterable[Mapping[str, Any]], role: str, kind: str) -> set[str]:
    return {end for record in samplers for end in record["keeps"][role][kind]}
