from __future__ import annotations

import pickle

import pytest

import fp16_patch
from fp16_patch.plan.errors import (
    Conflict,
    Fp16PatchError,
    LossScaleCollapse,
    MismatchAlert,
    PatchError,
    PlanError,
    PrecisionError,
    PrecisionFinding,
    RankLeftAlone,
)

ERRORS = [
    PlanError([Conflict("a.b", 1, "no", "yes")]),
    PatchError("changed"),
    PrecisionError([PrecisionFinding("host", 7, "actor", "autocast", "bfloat16", "float16")]),
    LossScaleCollapse("actor", 3, "too many", {0: [], 1: ["layers.0.weight"]}),
    LossScaleCollapse("actor", 3, "too many", {0: [], 1: []}, {1: "lm_head (gradient of the output)"}),
    MismatchAlert(3, ["k1: mismatch/k1 is 0.2, above 0.1, since step 2"]),
]


@pytest.mark.parametrize("error", [*ERRORS, RankLeftAlone(ValueError("x"), 9)], ids=lambda error: type(error).__name__)
def test_errors_cross_process_borders_whole(error: Fp16PatchError) -> None:
    # Ray pickles what an actor raises.
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)


@pytest.mark.parametrize("error", dict.fromkeys(map(type, ERRORS)), ids=lambda error: error.__name__)
def test_errors_are_caught_by_the_names_that_tracebacks_show(error: type[Fp16PatchError]) -> None:
    assert getattr(fp16_patch, error.__name__) is error
    assert error.__module__ == "fp16_patch"


def test_precision_error_lists_host_pid_role_quantity_seen_and_wanted() -> None:
    text = str(ERRORS[2])
    header, row = text.splitlines()[1:]
    assert header.split() == ["host", "pid", "role", "quantity", "seen", "wanted"]
    assert row.split() == ["host", "7", "actor", "autocast", "bfloat16", "float16"]


def test_collapse_names_rank_step_and_parameters() -> None:
    text = str(ERRORS[3])
    assert "optimizer step 3" in text
    assert "rank 1: layers.0.weight" in text
    assert "rank 0" not in text


def test_collapse_names_where_the_overflow_began() -> None:
    assert "The overflow began in rank 1: lm_head (gradient of the output). Look at" in str(ERRORS[4])
    assert "began" not in str(ERRORS[3])


def test_what_a_conflict_quotes_is_text_of_one_line() -> None:
    said = str(Conflict("ke\ny", "\x1b[2J" + "v" * 5000, "\u202e", "\x07"))
    assert said.isprintable()
    assert said.startswith(r"ke\ny=\x1b[2Jvvv")
    assert len(said) < 300
