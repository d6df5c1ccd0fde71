"""Dumps made after public reports, in the folder that LOG_PROB_DUMPS names: each is read as what happened in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.report.dump_lines import DumpError
from fp16_patch.mismatch.report.offline import analyze

FOLDER = os.environ.get("LOG_PROB_DUMPS")

READ = {
    "rare-spikes": ["rare_spikes"],
    "none-where-p-is-1": ["certain_tokens", "precision"],
    "first-token-grid": ["one_position"],
    "resume-burst": ["after_start", "precision"],
    "old-logps-null": ["precision"],
}
TOKENS = {"batch-of-two": {1: 80}, "floats": {3: 40}, "areal": {0: 40}, "skyrl": {0: 40}}
"""Dumps too short to say what their gap comes from: step → tokens."""

pytestmark = pytest.mark.skipif(FOLDER is None, reason="LOG_PROB_DUMPS names no folder of dumps")


def dump(name: str) -> Path:
    return Path(str(FOLDER)) / f"{name}.jsonl.gz"


@pytest.mark.parametrize("name", READ)
def test_a_dump_is_read_as_what_happened(name: str) -> None:
    assert [finding.cause for finding in diagnose_run(analyze(dump(name)))] == READ[name]


@pytest.mark.parametrize("name", TOKENS)
def test_a_dump_is_read(name: str) -> None:
    assert {step: stats.tokens for step, stats in analyze(dump(name)).step_stats.items()} == TOKENS[name]


def test_what_is_no_log_prob_is_refused() -> None:
    with pytest.raises(
        DumpError, match="a log-prob is not above 0, so these are no log-probs, and nothing is computed"
    ):
        analyze(dump("positive-log-probs"))
