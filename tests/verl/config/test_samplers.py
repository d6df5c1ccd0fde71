"""Every model that verl serves is a role, with a sampler's refusals: policy, reward model, teachers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from fp16_patch import Plan
from fp16_patch.patching.declarations import installed_release

pytestmark = pytest.mark.verl

TEACHERS = "distillation.teacher_models"
GSM8K, GEO3K = f"{TEACHERS}.gsm8k", f"{TEACHERS}.geo3k"
Composed = Callable[..., Any]


@pytest.fixture
def distilling(compose: Composed) -> Composed:
    """The configuration of a distillation run."""
    if "distillation" not in compose():
        pytest.skip("verl distils since 0.8.0")
    return lambda *overrides: compose("distillation.enabled=True", *overrides)


@pytest.fixture
def several(distilling: Composed) -> Composed:
    """One with two teachers, which have nothing of verl's defaults."""
    return lambda *overrides: distilling(
        *(f"+{teacher}.{key}" for teacher in (GSM8K, GEO3K) for key in ("key=k", "inference.name=vllm")), *overrides
    )


def conflicts(config: Any, **settings: Any) -> list[str]:
    from fp16_patch.verl.config.settings import conflicts_of

    return [str(conflict) for conflict in conflicts_of(config, Plan(**settings))]


def roles(config: Any, mode: str) -> dict[str, str]:
    from fp16_patch.verl.config.settings import effective_dtypes

    return effective_dtypes(config, Plan(mode=mode))


def test_a_teacher_is_a_role_that_takes_the_samplers_dtype(distilling: Composed) -> None:
    config = distilling("actor_rollout_ref.rollout.dtype=float16")
    assert roles(config, "observe")["teacher"] == "float16"
    assert roles(config, "bf16")["teacher"] == "bfloat16"


def test_several_teachers_are_a_role_each_and_the_one_of_the_defaults_is_none(several: Composed) -> None:
    config = several("actor_rollout_ref.rollout.dtype=float16", f"+{GEO3K}.inference.dtype=float16")
    stock = roles(config, "observe")
    # They do not take the sampler's dtype by themselves.
    assert {role: dtype for role, dtype in stock.items() if "teacher" in role} == {
        "teacher gsm8k": "bfloat16",
        "teacher geo3k": "float16",
    }
    assert roles(config, "fp16")["teacher gsm8k"] == "float16"


def test_teachers_of_a_run_that_does_not_distil_are_no_roles(compose: Composed) -> None:
    assert not [role for role in roles(compose(), "observe") if "teacher" in role]


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        (f"{TEACHERS}.teacher_model.inference.name=trtllm", f"{TEACHERS}.teacher_model.inference.name=trtllm: "),
        (
            f"+{TEACHERS}.teacher_model.inference.quantization=fp8",
            f"{TEACHERS}.teacher_model.inference.quantization=fp8: a quantized sampler is not float16. Fix: set it",
        ),
        (
            f"+{TEACHERS}.teacher_model.inference.engine_kwargs.vllm.dtype=bfloat16",
            f"{TEACHERS}.teacher_model.inference.engine_kwargs.vllm.dtype=bfloat16: it overrides the plan's float16",
        ),
    ],
)
def test_a_teacher_is_refused_for_what_a_sampler_is_refused_for(
    override: str, refused: str, distilling: Composed, activated: Any
) -> None:
    activated()
    (said,) = conflicts(distilling(override))
    assert said.startswith(refused)


def test_a_teacher_without_a_sampler_is_told_which_to_name(distilling: Composed, activated: Any) -> None:
    activated()
    key = f"{GSM8K}.inference.name"
    (said,) = conflicts(distilling(f"+{GSM8K}.key=k"))
    assert said == f"{key}=None: no sampler is named. Fix: add {key}=vllm"


def test_a_teacher_is_refused_for_its_model(several: Composed, activated: Any, tmp_path: Path) -> None:
    activated()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    (said,) = conflicts(several(f"+{GEO3K}.model_path={tmp_path}"))
    assert said.startswith(f"{GEO3K}.model_path={tmp_path}: the model is stored quantized (awq), and would be served")


def test_teachers_are_told_the_plans_dtype(several: Composed, activated: Any) -> None:
    from fp16_patch.verl.config.settings import apply_to

    config = several()
    apply_to(config, activated())
    assert config.distillation.teacher_models.gsm8k.inference.dtype == "float16"


def test_the_check_before_training_asks_for_a_teachers_weights(distilling: Composed) -> None:
    from tests.verl.trainers.test_preflight import required

    assert required(distilling(), set())["teacher"] == ("engine_weight",)


@pytest.mark.parametrize("spelling", ["reward.reward_model", "reward_model"])
def test_a_served_reward_model_is_judged_however_it_is_spelled(
    spelling: str, compose: Composed, activated: Any
) -> None:
    if "reward" not in compose():
        pytest.skip("verl serves reward models by this section since 0.7.1")
    activated()
    overrides = (f"{spelling}.enable=True", f"{spelling}.rollout.name=trtllm")
    assert roles(compose(*overrides), "observe")["reward"] == "bfloat16"
    (said,) = conflicts(compose(*overrides))
    assert said.startswith(f"{spelling}.rollout.name=trtllm: fp16_patch cannot vouch for this sampler")


def test_a_reward_models_worker_of_former_releases_is_a_role(compose: Composed) -> None:
    if "reward" in compose():
        pytest.skip("verl scores by workers up to 0.7.0")
    served = "use_reward_loop" in compose().reward_model
    stock = roles(
        compose("reward_model.enable=True", *(["reward_model.use_reward_loop=False"] if served else [])), "observe"
    )
    assert stock["reward"] == "bfloat16"
    assert roles(compose("reward_model.enable=True"), "fp16")["reward"] == "float16"


@pytest.mark.parametrize("argument", ["kv_cache_dtype", "kv-cache-dtype", "mamba_ssm_cache_dtype"])
def test_an_argument_of_vllm_is_refused_in_either_spelling(argument: str, compose: Composed, activated: Any) -> None:
    activated()
    key = f"actor_rollout_ref.rollout.engine_kwargs.vllm.{argument}"
    (said,) = conflicts(compose(f"+{key}=bfloat16"))
    assert said.startswith(f"{key}=bfloat16: it overrides the plan's float16")


@pytest.mark.parametrize("value", ["auto", "float32", "float16"])
def test_the_state_of_a_recurrent_layer_may_be_held_in_float32(value: str, compose: Composed, activated: Any) -> None:
    activated()
    assert conflicts(compose(f"+actor_rollout_ref.rollout.engine_kwargs.vllm.mamba_ssm_cache_dtype={value}")) == []


def test_what_vllm_is_told_last_is_what_it_computes_in_without_a_plan(compose: Composed) -> None:
    config = compose("+actor_rollout_ref.rollout.engine_kwargs.vllm.dtype=half")
    assert roles(config, "observe")["rollout"] == "float16"


SGLANG = "actor_rollout_ref.rollout.name=sglang"
needs_plugins = pytest.mark.skipif(
    Version(installed_release("verl") or "0") < Version("0.8"), reason="the schedulers of its SGLang load no plugins"
)


@needs_plugins
def test_sglang_is_a_sampler_in_the_plans_dtype(compose: Composed, activated: Any) -> None:
    from fp16_patch.verl.config.settings import apply_to

    plan = activated()
    config = compose(SGLANG)
    assert roles(config, "observe")["rollout"] == "bfloat16"
    assert conflicts(config) == []
    apply_to(config, plan)
    assert config.actor_rollout_ref.rollout.dtype == "float16"


@needs_plugins
@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("dtype", "bfloat16", "it overrides the plan's float16"),
        ("kv_cache_dtype", "fp8_e5m2", "it overrides the plan's float16"),
        ("rl_on_policy_target", "fsdp", "it casts logits, the head and activations to bfloat16"),
        ("moe_a2a_backend", "deepep", "its kernels exchange the experts' tokens in bfloat16 only"),
    ],
)
def test_an_argument_of_sglang_is_refused_where_sglang_samples(
    argument: str, value: str, reason: str, compose: Composed, activated: Any
) -> None:
    activated()
    key = f"actor_rollout_ref.rollout.engine_kwargs.sglang.{argument}"
    (said,) = conflicts(compose(SGLANG, f"+{key}={value}"))
    assert said.startswith(f"{key}={value}: {reason}")
    assert said.endswith("Fix: remove it")
    assert conflicts(compose(f"+{key}={value}")) == []


@needs_plugins
def test_what_sglang_is_told_last_is_what_it_computes_in_without_a_plan(compose: Composed) -> None:
    config = compose(SGLANG, "+actor_rollout_ref.rollout.engine_kwargs.sglang.dtype=half")
    assert roles(config, "observe")["rollout"] == "float16"


@pytest.mark.skipif(Version(installed_release("verl") or "1") >= Version("0.8"), reason="its SGLang loads plugins")
def test_an_sglang_without_plugins_is_refused_with_what_goes(compose: Composed, activated: Any) -> None:
    activated()
    (said,) = conflicts(compose(SGLANG))
    assert said.startswith(f"{SGLANG}: ")
    assert "load no plugins" in said
    assert said.endswith("Fix: use verl 0.8.0 or newer, or vllm")


def test_log_probs_of_sglang_are_those_it_samples_by_and_of_the_whole_vocabulary(compose: Composed) -> None:
    from fp16_patch.verl.config.caveats import caveats_of

    # Off by default before 0.9.
    rollout = "actor_rollout_ref.rollout"
    measured = (f"{rollout}.calculate_log_probs=True", f"{rollout}.top_p=0.9", f"{rollout}.logprobs_mode=raw_logprobs")
    assert len(caveats_of(compose(*measured))) == 2
    assert caveats_of(compose(*measured, SGLANG)) == []
