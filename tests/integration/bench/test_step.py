"""What an FP16 step costs: ratios within a turn, the README's table, and the figures it has to hold."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from integration.bench import step, step_table, write

ARM = {"passes": 2.0, "bytes_per_parameter": 12.0}
RESULTS = {
    "updates": 200,
    "planted": 10,
    "lost_stock": 10,
    "lost_ours": 0,
    "calibration_skips_stock": 5,
    "calibration_skips_ours": 0,
    "retry_bitwise": True,
    "passes_stock": 5.0,
    "passes_ours": 2.0,
    "passes_stock_bf16": 4.0,
    "wire_bytes_ratio": 0.5,
    "sampler_bitwise": True,
    "step_ratio": {"some GPU": {"500M": 0.974}},
    "sizes": {
        "10M": {
            "parameters": 10_600_000,
            "arms": dict.fromkeys(step.ARMS, ARM),
            "ratios": {"optimizer": {"bf16 stock": 1.0, "fp16 stock": 1.4, "bf16 ours": 0.3, "fp16 ours": 0.4}},
        }
    },
}


def test_a_ratio_is_of_one_turn_so_that_a_slow_turn_changes_nothing() -> None:
    turns = [
        {"bf16 stock": {"optimizer": slow}, **{arm: {"optimizer": 2 * slow} for arm in list(step.ARMS)[1:]}}
        for slow in (1.0, 9.0, 2.0)
    ]
    assert step._ratios(turns, "optimizer") == {
        "bf16 stock": 1.0,
        "fp16 stock": 2.0,
        "bf16 ours": 2.0,
        "fp16 ours": 2.0,
    }


def test_the_table_says_what_was_measured() -> None:
    table = step_table.table(RESULTS)
    assert "| mini-batches lost in 200 updates with 10 planted overflows | 10 | 0 |" in table
    assert "| passes over the gradients in an FP16 step | 5 | 2 |" in table
    assert "| bytes of a weight sync | 1 | 0.5 |" in table
    assert "| a whole FP16 step ÷ a BF16 step, 500M parameters, some GPU | – | 0.97 |" in table
    assert "| 11 M parameters | 1.40 | 0.30 | 0.40 |" in table


def test_the_table_of_what_is_not_measured_yet_has_no_row_for_it() -> None:
    table = step_table.table({"lost_stock": 10, **{name: RESULTS[name] for name in list(RESULTS)[:7]}})
    assert "wire" not in table and "passes" not in table and "optimizer" not in table
    assert "None" not in table


def test_a_step_that_retries_make_another_one_is_called_so() -> None:
    assert "| – | another one |" in step_table.table({**RESULTS, "retry_bitwise": False})


def test_what_is_measured_says_how() -> None:
    results = json.loads(write.STEP.read_text(encoding="utf-8"))
    assert set(results["made_of"]) == set(step.SECTIONS)
    for made_of in results["made_of"].values():
        assert {"command", "seed", "releases", "machine"} <= made_of.keys()
    promised = {"lost_stock", "lost_ours", "calibration_skips_stock", "calibration_skips_ours", "retry_bitwise"}
    assert promised | {"passes_stock", "passes_ours", "wire_bytes_ratio", "step_ratio"} <= results.keys()
