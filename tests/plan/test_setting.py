"""Values of settings: what is read of them, what is refused, and how a message quotes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp16_patch import Plan, PlanError
from fp16_patch.plan.plan import PLAN_ENV
from fp16_patch.plan.settings import HIGHEST_SCALE, LOWEST_SCALE, MOST_STEPS, SETTINGS
from fp16_patch.untrusted.text import printable

NUMBERS = [name for name, setting in SETTINGS.items() if setting.type in ("float", "int")]
COUNTS = [name for name in NUMBERS if SETTINGS[name].type == "int"]
SCALES = ("init_scale", "min_scale")

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**320), 10**320)
    | st.floats()
    | st.text()
    | st.binary()
    | st.from_regex(r"[+-]?[0-9_.eExX ]{1,12}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def refusal(name: str, value: Any) -> str:
    with pytest.raises(PlanError) as refused:
        Plan.from_settings({name: value}, "fp16_patch")
    return str(refused.value)


@settings(max_examples=300)
@given(st.sampled_from(sorted(SETTINGS)), ANYTHING)
def test_any_value_gives_a_plan_or_an_error_that_names_the_setting(name: str, value: Any) -> None:
    try:
        # The mode leaves out what a probe's file says: it is not read.
        plan = Plan.from_settings({name: value}, "fp16_patch", Plan(mode="bf16"))
    except PlanError as refused:
        assert str(refused).startswith(f"fp16_patch.{name}=")
        assert all(line == printable(line) for line in str(refused).split("\n"))
        assert len(str(refused)) < 1000
    else:
        kept = getattr(plan, name)
        assert SETTINGS[name].problem(kept) is None
        assert not isinstance(kept, float) or math.isfinite(kept)
        assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=100)
@given(st.sampled_from(sorted(SETTINGS)), ANYTHING)
def test_a_plan_made_by_hand_is_held_to_the_same(name: str, value: Any) -> None:
    try:
        kept = getattr(Plan(**{"mode": "bf16", name: value}), name)
    except PlanError as refused:
        assert str(refused).startswith(f"fp16_patch.{name}=")
    else:
        assert SETTINGS[name].problem(kept) is None


@pytest.mark.parametrize(
    "value",
    [True, False, b"4", "\uff14", "\u0664", "1_0", "0x4", "4\n", "\xa04", "\t4", "4 4", "", " ", None, [4], "4" * 65],
    ids=repr,
)
def test_only_decimal_numbers_are_numbers(value: Any) -> None:
    for name in NUMBERS:
        assert "the value cannot be read. Fix: give a" in refusal(name, value)


@pytest.mark.parametrize("value", ["400", " 400 ", "4e2", "400.", "+4.0E+2", 400, 400.0])
def test_a_whole_number_is_read_as_it_is_commonly_written(value: Any) -> None:
    assert Plan.from_settings({"growth_interval": value}, "fp16_patch").growth_interval == 400


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_two_ends_and_nan_is_in_none(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1, 10**400, "1e400", "nan", "-Infinity"):
        refusal(name, value)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_fit_the_counters_that_they_become(name: str) -> None:
    for value in (MOST_STEPS + 1, 1e308, "9" * 20):
        assert "out of range" in refusal(name, value)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("value", [1e39, 2.0**127, 1e300, 2.0**-127, 1e-46, 0, -4])
def test_a_scale_is_a_normal_number_of_fp32(name: str, value: float) -> None:
    assert "out of range. Fix: use a scale of 2⁻¹²⁶ to 2¹²⁶" in refusal(name, value)


@pytest.mark.parametrize("scale", [1e300, -4.0, math.nan, math.inf, 0])
def test_no_scale_that_is_none_comes_from_a_probe_or_a_carried_plan(tmp_path: Path, scale: float) -> None:
    probe = tmp_path / "probe.json"
    advice = {"precision": "fp16", "init_scale": scale, "reasons": [], "fp32_modules": []}
    probe.write_text(json.dumps({"version": 1, "recommendation": advice}))
    for environ in (
        {"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(probe)},
        {PLAN_ENV: json.dumps({"mode": "fp16", "init_scale": scale})},
    ):
        with pytest.raises(PlanError):
            Plan.from_environment(environ)


def test_the_ends_of_a_scale_and_their_reciprocals_are_normal_in_fp32() -> None:
    torch = pytest.importorskip("torch")
    for end in (LOWEST_SCALE, HIGHEST_SCALE):
        assert Plan(init_scale=end, min_scale=LOWEST_SCALE).init_scale == end
        assert torch.tensor(1 / end).item() == 1 / end >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(
    ("name", "factor"),
    [("backoff_factor", 1 - 1e-9), ("backoff_factor", 1e-300), ("growth_factor", 1 + 1e-9), ("growth_factor", 1e300)],
)
def test_a_factor_that_fp32_rounds_away_is_refused(name: str, factor: float) -> None:
    assert "out of range. Fix: use a factor of" in refusal(name, factor)


@pytest.mark.parametrize("seconds", [3601, 4e9, 1e308, 0])
def test_no_step_waits_longer_than_an_hour(seconds: float) -> None:
    assert "at most 3600" in refusal("monitor_timeout_s", seconds)


def test_a_path_is_text_that_a_file_system_may_hold() -> None:
    assert Plan.from_settings({"out_dir": 2026}, "fp16_patch").out_dir == "2026"
    for value in (True, 1.5, b"runs", ["runs"]):
        assert "give a path" in refusal("out_dir", value)
    assert "NUL" in refusal("out_dir", "a\0b")
    assert "longer than 4096 characters" in refusal("probe", "a" * 4097)


def test_a_long_value_is_quoted_shortly_and_its_control_characters_are_escaped() -> None:
    message = refusal("init_scale", "\x1b]0;title\x07\n" + "9" * 5000)
    assert len(message) < 400
    assert message.isprintable()
    assert r"init_scale=\x1b]0;title\x07\n9999" in message


def test_a_number_too_long_to_write_is_named_by_its_type() -> None:
    assert refusal("init_scale", 10**5000).startswith("fp16_patch.init_scale=(int): ")


def test_the_name_of_a_setting_that_there_is_none_of_is_escaped() -> None:
    with pytest.raises(PlanError, match=r"no such setting") as refused:
        Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_\x1b[2J": "1"})
    assert str(refused.value).isprintable()
