"""A probe's result is data: what is damaged is refused by file, field, value and fix, whatever it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp16_patch import Plan
from fp16_patch.plan.errors import PlanError
from fp16_patch.plan.probe_settings import MAX_BYTES, conflict_with

DIGEST = "0" * 16


def result(**changes: Any) -> dict[str, Any]:
    """Make what a probe writes, as far as it is read, with values under dotted names changed; `...` takes one away."""
    made: dict[str, Any] = {
        "version": 1,
        "model": {"path": "/models/tiny", "config_digest": DIGEST},
        "recommendation": {"precision": "fp16", "init_scale": 512.0, "reasons": ["room"], "fp32_modules": []},
    }
    for name, value in changes.items():
        section, _, inner = name.rpartition(".")
        place = made[section] if section else made
        place.update({inner: value})
        if value is ...:
            del place[inner]
    return made


def plan_with(path: object) -> Plan:
    return Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(path)})


def refusal_of(path: object) -> str:
    with pytest.raises(PlanError) as refused:
        plan_with(path)
    assert len(refused.value.conflicts) == 1
    return str(refused.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "probe.json"


@pytest.mark.parametrize("scale", [512, 512.0, 1, 2.0**127])
def test_a_result_is_taken(file: Path, scale: float) -> None:
    file.write_text(json.dumps(result(**{"recommendation.init_scale": scale})))
    assert plan_with(file).init_scale == scale


FIELDS = {
    "version": [..., None, True, "1", 1.5, 2, [1]],
    "model": [..., None, [], "tiny"],
    "model.path": [..., None, 5, ["/models/tiny"]],
    "model.config_digest": [..., None, 0, {}],
    "recommendation": [..., None, [], "fp16", 5],
    "recommendation.precision": [..., None, True, "fp8", ["fp16"], {}],
    "recommendation.init_scale": [..., None, True, "512", [], 0, -512.0, float("nan"), float("inf"), 1e300, 3.5e38],
    "recommendation.reasons": [..., None, "room", [1], {}],
    "recommendation.fp32_modules": [..., None, "lm_head", [None], 7],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_damaged_field_is_named_with_its_value_and_the_fix(file: Path, field: str, value: Any) -> None:
    file.write_text(json.dumps(result(**{field: value})))
    said = refusal_of(file)
    assert said.startswith(f"FP16_PATCH_PROBE={file}: not the result of a probe: {field} is ")
    assert f"{field} is {'missing' if value is ... else value}, not " in said
    assert "Fix: give what `fp16-patch probe MODEL --json FILE` wrote" in said


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"null", "not an object"),
        (b"[" * 100_000, "nested more than"),
        (b'{"version": 1' + b"0" * 400 + b"}", "does not fit 64 bits"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"\0" * 40, "not JSON"),
    ],
)
def test_what_is_no_result_at_all_is_refused(file: Path, content: bytes, why: str) -> None:
    file.write_bytes(content)
    assert why in refusal_of(file)


def a_pipe(file: Path) -> Path:
    os.mkfifo(file)
    return file


def a_folder(file: Path) -> Path:
    file.mkdir()
    return file


def a_sparse_file(file: Path) -> Path:
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    return file


def a_loop(file: Path) -> Path:
    file.symlink_to(file)
    return file


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a device": (lambda file: "/dev/zero", "not a regular file"),
    "a pipe": (a_pipe, "not a regular file"),
    "a folder": (a_folder, "not a regular file"),
    "a terabyte of nothing": (a_sparse_file, f"larger than {MAX_BYTES} bytes"),
    "links in a circle": (a_loop, "too many levels of symbolic links"),
    "no file": (lambda file: file, "no such file"),
    "a name that is too long": (lambda file: file.with_name("n" * 5000), "file name too long"),
    "NUL": (lambda file: f"{file}\0", "NUL"),
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_but_a_file_of_bounded_size_is_read(file: Path, place: str) -> None:
    make, why = PLACES[place]
    assert why in refusal_of(make(file))


def test_texts_of_a_result_are_shown_as_text(file: Path) -> None:
    advice = {"recommendation.precision": "bf16", "recommendation.reasons": ["\x1b]0;title\x07 \u202e [/b]"]}
    file.write_text(json.dumps(result(**advice)))
    assert r"unsafe in fp16: \x1b]0;title\x07 \u202e [/b]. Fix: use FP16_PATCH=bf16" in refusal_of(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*FIELDS]), json_values | st.just(...), max_size=2), st.binary(max_size=3))
def test_any_damage_is_a_plan_error(file: Path, changes: dict[str, Any], tail: bytes) -> None:
    # Fields before the sections that they would be in.
    ordered = dict(sorted(changes.items(), key=lambda item: "." not in item[0]))
    file.write_bytes(json.dumps(result(**ordered)).encode() + tail)
    try:
        plan = plan_with(file)
    except PlanError as refused:
        # A scale below the least one is a matter of two settings.
        assert str(file) in str(refused) or "min_scale" in str(refused)
    else:
        assert 0 < plan.init_scale < float("inf")


@pytest.mark.parametrize("model", ["m" * 5000, "a/" + "m" * 5000, "bad\0name", "~nobody-of-this-name/model", None])
def test_a_model_that_cannot_be_looked_at_is_not_compared(file: Path, model: object) -> None:
    file.write_text(json.dumps(result()))
    assert conflict_with(str(file), "model.path", model) is None


def test_a_configuration_without_end_is_not_compared(file: Path, tmp_path: Path) -> None:
    file.write_text(json.dumps(result()))
    a_sparse_file(tmp_path / "config.json")
    assert conflict_with(str(file), "model.path", tmp_path) is None
