from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch import Plan, PlanError, wanted
from fp16_patch.plan.in_force import misspelled_variables
from fp16_patch.plan.plan import PLAN_ENV, resolve, resolve_environment
from fp16_patch.plan.settings import SETTINGS


@pytest.mark.parametrize(
    ("value", "mode", "dtype"),
    [("1", "fp16", "float16"), ("fp16", "fp16", "float16"), ("bf16", "bf16", "bfloat16"), ("FP32", "fp32", "float32")]
    + [(word, "fp16", "float16") for word in ("float16", "half", "yes", "on", "True")]
    + [("bfloat16", "bf16", "bfloat16"), ("float32", "fp32", "float32")],
)
def test_one_knob_names_mode_and_dtype(value: str, mode: str, dtype: str) -> None:
    plan = Plan.from_environment({"FP16_PATCH": value})
    assert (plan.mode, plan.dtype, plan.overrides_dtype) == (mode, dtype, True)


@pytest.mark.parametrize("value", ["0", "off", "", "false", "no"])
def test_off_is_not_active(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Plan.from_environment({"FP16_PATCH": value}).active
    # The entry points ask without loading the plan.
    monkeypatch.setenv("FP16_PATCH", value)
    assert not wanted()


@pytest.mark.parametrize(
    ("word", "value"), [("1", True), ("TRUE", True), ("yes", True), ("on", True), ("0", False), ("off", False)]
)
def test_every_switch_takes_the_same_words(word: str, value: bool) -> None:
    plan = Plan.from_settings({"strict": word, "monitor": word, "fused_step": word}, "fp16_patch")
    assert (plan.strict, plan.monitor, plan.fused_step) == (value, value, value)


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
        ("FP16_PATCH_GROWTH_INTERVAL", "0", "out of range. Fix: use at least 1 step, 400 by default"),
        ("FP16_PATCH", "fp8", "no such mode. Fix: use one of fp16, bf16, fp32, observe, off (1 = fp16)"),
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


def test_a_setting_says_where_its_value_came_from(tmp_path: Path) -> None:
    probe = tmp_path / "probe.json"
    advice = {"precision": "fp16", "init_scale": 512.0, "reasons": [], "fp32_modules": []}
    model = {"path": "/models/tiny", "config_digest": "0" * 16}
    probe.write_text(json.dumps({"version": 1, "model": model, "recommendation": advice}))
    environ = {"FP16_PATCH_PROBE": str(probe), "FP16_PATCH_STRICT": "0"}

    plan, origins = resolve_environment(environ, "fp16")
    assert (plan.mode, plan.init_scale) == ("fp16", 512.0)
    assert origins == {
        "probe": "FP16_PATCH_PROBE",
        "strict": "FP16_PATCH_STRICT",
        "init_scale": str(probe),
        "first_scale": str(probe),
    }
    assert resolve({"init_scale": 8}, "fp16_patch", plan)[1] == {
        "init_scale": "fp16_patch.init_scale",
        "first_scale": "fp16_patch.init_scale",
    }
    assert resolve_environment({PLAN_ENV: Plan(max_retries=2).to_json()}, "off")[1] == {"max_retries": PLAN_ENV}


def test_a_plans_settings_are_the_tables() -> None:
    assert {field.name for field in fields(Plan)} == set(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.default == getattr(Plan(), name)
        assert setting.problem(setting.default) is None
        assert setting.parse(setting.show(setting.default)) == setting.default or setting.default is None
        assert setting.help and setting.group and setting.where


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("FP16PATCH", "FP16_PATCH"),
        ("fp16_patch", "FP16_PATCH"),
        ("fp16_patch_init_scale", "FP16_PATCH_INIT_SCALE"),
        ("FP16PATCH_MAXRETRIES", "FP16_PATCH_MAX_RETRIES"),
        ("FP16PATCH_INTERVAL", "FP16_PATCH_…"),
    ],
)
def test_a_variable_that_looks_like_ours_is_named(given: str, meant: str) -> None:
    environ = {"FP16_PATCH": "1", "FP16_PATCH_STRICT": "0", "PATH": "", given: "1"}
    assert list(misspelled_variables(environ)) == [(given, meant)]


def test_a_probe_that_cannot_be_read_is_named_as_it_was_given(tmp_path: Path) -> None:
    missing = str(tmp_path / "probe.json")
    with pytest.raises(PlanError, match=rf"^FP16_PATCH_PROBE={missing}: not the result of a probe"):
        Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": missing})
    with pytest.raises(PlanError, match=rf"^fp16_patch\.probe={missing}: not the result of a probe"):
        Plan.from_settings({"probe": missing}, "fp16_patch", base=Plan())
