from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch import Plan, PlanError
from fp16_patch.plan.plan import PLAN_ENV


@pytest.mark.parametrize(
    ("value", "mode", "dtype"),
    [("1", "fp16", "float16"), ("fp16", "fp16", "float16"), ("bf16", "bf16", "bfloat16"), ("FP32", "fp32", "float32")],
)
def test_one_knob_names_mode_and_dtype(value: str, mode: str, dtype: str) -> None:
    plan = Plan.from_environment({"FP16_PATCH": value})
    assert (plan.mode, plan.dtype, plan.overrides_dtype) == (mode, dtype, True)


@pytest.mark.parametrize("value", ["0", "off", "", "false"])
def test_off_is_not_active(value: str) -> None:
    assert not Plan.from_environment({"FP16_PATCH": value}).active


def test_unset_is_off() -> None:
    assert not Plan.from_environment({}).active


def test_observe_decides_no_dtype() -> None:
    plan = Plan(mode="observe")
    assert plan.active
    assert not plan.overrides_dtype
    with pytest.raises(ValueError, match="decides no dtype"):
        _ = plan.torch_dtype


def test_settings_come_from_the_environment() -> None:
    plan = Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_INIT_SCALE": "1024", "FP16_PATCH_STRICT": "0"})
    assert plan == Plan(init_scale=1024.0, strict=False)


def test_the_first_scale_is_measured_unless_one_is_given() -> None:
    assert Plan.from_environment({"FP16_PATCH": "1"}).first_scale == "measured"
    for name, value in (("INIT_SCALE", "1024"), ("INIT_SCALE", "65536"), ("FIRST_SCALE", "fixed")):
        assert Plan.from_environment({"FP16_PATCH": "1", f"FP16_PATCH_{name}": value}).first_scale == "fixed"
    base = Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_INIT_SCALE": "65536"})
    assert Plan.from_settings({"min_scale": 2}, "fp16_patch", base=base).first_scale == "fixed"
    assert Plan(init_scale=1024.0).first_scale == "fixed"


@given(
    st.builds(
        Plan,
        mode=st.sampled_from(["fp16", "bf16", "fp32", "observe"]),
        init_scale=st.floats(1, 2**24),
        growth_interval=st.integers(1, 10_000),
        max_consecutive_skips=st.integers(1, 100),
        first_scale=st.sampled_from(["measured", "fixed"]),
        on_overflow=st.sampled_from(["retry", "skip"]),
        max_retries=st.integers(0, 20),
        scale_rule=st.sampled_from(["torch", "ahead"]),
        gradient_look_every=st.integers(0, 100),
        strict=st.booleans(),
        out_dir=st.none() | st.text(min_size=1),
    )
)
def test_a_carried_plan_arrives_unchanged(plan: Plan) -> None:
    assert Plan.from_environment({PLAN_ENV: plan.to_json(), "FP16_PATCH": "off"}) == plan


def test_an_unknown_setting_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(
        PlanError, match=r"fp16_patch\.init_scal=8: fp16_patch has no such setting.*did you mean 'init_scale'"
    ):
        Plan.from_settings({"init_scal": 8}, source="fp16_patch")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FP16_PATCH_INITSCALE", "8", "no such setting. Fix: did you mean 'FP16_PATCH_INIT_SCALE'?"),
        ("FP16_PATCH_INIT_SCALE", "high", "the value cannot be read. Fix: give a number"),
        ("FP16_PATCH_STRICT", "maybe", "the value cannot be read. Fix: give true or false"),
        ("FP16_PATCH_MODE", "bf16", "no such setting. Fix: set FP16_PATCH"),
    ],
)
def test_a_wrong_variable_is_named_as_it_was_given(name: str, value: str, message: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_environment({"FP16_PATCH": "1", name: value})
    assert str(refused.value).startswith(f"{name}={value}: ")
    assert message in str(refused.value)


def test_variables_between_processes_are_no_settings() -> None:
    assert Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_ROLE": "rollout"}) == Plan()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fp8"}, r"mode=fp8: no such mode\. Fix: use one of fp16"),
        ({"init_scale": "many"}, r"init_scale=many: the value cannot be read\. Fix: give a number"),
        ({"init_scale": 0}, r"init_scale=0.0: out of range"),
        ({"init_scale": "inf"}, r"init_scale=inf: out of range"),
        ({"growth_interval": 1.5}, r"growth_interval=1.5: the value cannot be read"),
        ({"backoff_factor": 1}, r"backoff_factor=1.0: out of range"),
        ({"max_consecutive_skips": 0}, r"max_consecutive_skips=0: out of range"),
        ({"on_overflow": "again"}, r"on_overflow=again: no such action\. Fix: use retry or skip"),
        ({"first_scale": "guessed"}, r"first_scale=guessed: no such start\. Fix: use measured or fixed"),
        ({"scale_rule": "blind"}, r"scale_rule=blind: no such rule\. Fix: use torch or ahead"),
        ({"gradient_look_every": -1}, r"gradient_look_every=-1: out of range\. Fix: use a number of steps, 25"),
        ({"max_retries": -1}, r"max_retries=-1: out of range"),
        ({"min_scale": 8, "init_scale": 4}, r"min_scale=8.0: above init_scale"),
    ],
)
def test_a_wrong_setting_names_setting_value_and_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_settings(settings, source="fp16_patch")


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_settings({"init_scal": 8, "strict": "perhaps"}, source="fp16_patch")
    assert len(caught.value.conflicts) == 2


def test_the_readme_lists_every_setting() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| setting | default | |")[2].partition("\n\n")[0]
    listed = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert listed == {field.name for field in fields(Plan)} - {"mode"}
