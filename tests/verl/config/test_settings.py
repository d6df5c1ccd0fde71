"""What the plan makes of verl's own configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp16_patch import Plan, PlanError

pytestmark = pytest.mark.verl

KEY = "actor_rollout_ref.actor.fsdp_config"


def conflicts(config: Any, **settings: Any) -> list[str]:
    from fp16_patch.verl.config.settings import conflicts_of

    return [str(conflict) for conflict in conflicts_of(config, Plan(**settings))]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_the_stock_configuration_has_no_conflict(activated: Any, compose: Callable[..., Any], strategy: str) -> None:
    activated()
    config = compose(f"actor_rollout_ref.actor.strategy={strategy}", "algorithm.adv_estimator=gae")
    assert conflicts(config) == []


@pytest.mark.parametrize(
    ("override", "key", "value", "fix"),
    [
        ("critic.strategy=automodel", "critic.strategy", "automodel", "use fsdp, fsdp2 or megatron"),
        (f"{KEY}.qat.enable=True", f"{KEY}.qat.enable", "True", "set it to false"),
        (
            "actor_rollout_ref.rollout.quantization=fp8",
            "actor_rollout_ref.rollout.quantization",
            "fp8",
            "set it to null",
        ),
        ("actor_rollout_ref.rollout.name=trtllm", "actor_rollout_ref.rollout.name", "trtllm", "use vllm or sglang"),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.dtype=bfloat16",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.dtype",
            "bfloat16",
            "remove it",
        ),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype=fp8",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype",
            "fp8",
            "remove it",
        ),
        (
            "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded",
            "actor_rollout_ref.rollout.checkpoint_engine.backend",
            "delta_sharded",
            "use naive or nccl",
        ),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=ray",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend",
            "ray",
            "remove it",
        ),
        (
            "actor_rollout_ref.model.use_fused_kernels=True",
            "actor_rollout_ref.model.use_fused_kernels",
            "True",
            "set it to false",
        ),
    ],
)
def test_what_cannot_be_float16_is_refused_with_key_value_and_fix(
    activated: Any, compose: Callable[..., Any], override: str, key: str, value: str, fix: str
) -> None:
    activated()
    (message,) = conflicts(compose("algorithm.adv_estimator=gae", override))
    assert message.startswith(f"{key}={value}: ")
    assert f"Fix: {fix}" in message


def test_a_sampler_that_is_not_named_is_asked_for(activated: Any, compose: Callable[..., Any]) -> None:
    activated()
    (message,) = conflicts(compose("~actor_rollout_ref.rollout.name"))
    assert message == (
        "actor_rollout_ref.rollout.name=None: no sampler is named. Fix: add actor_rollout_ref.rollout.name=vllm"
    )


def test_a_switch_of_legacy_workers_is_a_conflict_only_where_there_are_some(
    activated: Any, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp16_patch.verl.config import settings

    activated()
    config = compose("++trainer.use_legacy_worker_impl=disable")
    for legacy in (True, False):
        monkeypatch.setattr(settings, "has_legacy_workers", lambda legacy=legacy: legacy)
        assert len(conflicts(config)) == legacy


def test_all_refusals_come_at_once_and_before_anything_starts(activated: Any, compose: Callable[..., Any]) -> None:
    from verl.utils import config as verl_config

    activated()
    config = compose("actor_rollout_ref.rollout.quantization=fp8", f"{KEY}.qat.enable=True")  # and no batch sizes
    with pytest.raises(PlanError) as caught:
        verl_config.validate_config(config=config, use_reference_policy=False, use_critic=False)
    assert len(caught.value.conflicts) == 2


def test_observe_refuses_nothing(activated: Any, compose: Callable[..., Any]) -> None:
    from fp16_patch.verl.config.settings import check

    plan = activated(mode="observe")
    check(compose("actor_rollout_ref.rollout.quantization=fp8"), plan)


def test_settings_ride_in_the_configuration(activated: Any, compose: Callable[..., Any]) -> None:
    from fp16_patch.runtime.activation import current_plan
    from fp16_patch.verl.trainers.driver import prepare

    activated()
    prepare(compose("+fp16_patch.init_scale=1024", "+fp16_patch.max_consecutive_skips=5"))
    assert (current_plan().init_scale, current_plan().max_consecutive_skips) == (1024.0, 5)


def test_a_model_stored_quantized_is_refused(activated: Any, compose: Callable[..., Any], tmp_path: Path) -> None:
    activated()
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    (message,) = conflicts(compose(f"actor_rollout_ref.model.path={tmp_path}"))
    assert message.startswith(f"actor_rollout_ref.model.path={tmp_path}: the model is stored quantized (fp8)")


def test_what_is_forced_out_of_sight_is_named_too(activated: Any, compose: Callable[..., Any]) -> None:
    from fp16_patch.verl.config.settings import apply_to

    changed = apply_to(compose(f"{KEY}.model_dtype=bf16"), activated())
    assert f"{KEY}.model_dtype: bf16 → float32" in changed


def test_deferred_gradients_are_forced_off_where_there_is_such_a_setting(
    activated: Any, compose: Callable[..., Any]
) -> None:
    from omegaconf import OmegaConf

    from fp16_patch.verl.config.settings import apply_to

    deferred = f"{KEY}.use_no_sync_for_gradient_accumulation"
    known = OmegaConf.select(compose(), deferred) is not None
    config = compose(*([f"{deferred}=True"] if known else []))
    assert (f"{deferred}: True → False" in apply_to(config, activated())) == known
    assert OmegaConf.select(config, deferred) is (False if known else None)


def test_strictness_cannot_come_too_late(activated: Any, compose: Callable[..., Any]) -> None:
    from fp16_patch.verl.trainers.driver import prepare

    activated()
    with pytest.raises(PlanError, match="FP16_PATCH_STRICT=0"):
        prepare(compose("+fp16_patch.strict=false"))


@pytest.mark.parametrize(
    ("override", "caveat"),
    [
        ("actor_rollout_ref.rollout.top_p=0.9", "top_p"),
        ("actor_rollout_ref.rollout.calculate_log_probs=False", "calculate_log_probs=False"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode"),
        ("actor_rollout_ref.rollout.logprobs_mode=raw_logprobs", "temperature"),
    ],
)
def test_what_is_not_about_precision_is_said(compose: Callable[..., Any], override: str, caveat: str) -> None:
    from fp16_patch.verl.config.caveats import caveats_of

    # Off by default before 0.9.
    measured = "actor_rollout_ref.rollout.calculate_log_probs=True"
    assert caveats_of(compose(measured)) == []
    (said,) = caveats_of(compose(measured, override))
    assert caveat in said


def test_a_misspelt_setting_stops_the_run(activated: Any, compose: Callable[..., Any]) -> None:
    from fp16_patch.verl.trainers.driver import prepare

    activated()
    with pytest.raises(PlanError, match=r"fp16_patch\.init_scal=1024.*did you mean 'init_scale'"):
        prepare(compose("+fp16_patch.init_scal=1024"))


def test_the_configuration_says_what_is_computed_and_what_changed_is_named(
    activated: Any, compose: Callable[..., Any]
) -> None:
    from fp16_patch.verl.config.settings import apply_to

    config = compose("actor_rollout_ref.rollout.dtype=half", f"+{KEY}.mixed_precision.param_dtype=bf16")
    changed = apply_to(config, activated())
    assert config.actor_rollout_ref.rollout.dtype == "float16"
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "float16"
    assert f"{KEY}.dtype: bfloat16 → float16" in changed
    assert any(line.startswith(f"{KEY}.mixed_precision") for line in changed)
    assert not any("rollout.dtype" in line for line in changed)  # half is float16
    assert apply_to(config, Plan()) == []


@pytest.mark.parametrize(("mode", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_engine_and_rollout_take_the_plans_dtype(activated: Any, mode: str, dtype: str) -> None:
    from verl.workers.config import FSDPEngineConfig, RolloutConfig

    activated(mode=mode)
    engine = FSDPEngineConfig(dtype="garbage", mixed_precision={"param_dtype": "fp32"}, model_dtype="bf16")
    assert (engine.dtype, engine.mixed_precision["param_dtype"]) == (dtype, dtype)
    assert (engine.mixed_precision["reduce_dtype"], engine.model_dtype) == ("float32", "float32")
    assert RolloutConfig(name="vllm", dtype="bfloat16").dtype == dtype


def test_a_forward_only_model_kept_in_half_is_kept_in_the_plans_half(activated: Any) -> None:
    from verl.workers.config import FSDPEngineConfig

    activated()
    assert FSDPEngineConfig(forward_only=True, model_dtype="bf16").model_dtype == "float16"
    assert FSDPEngineConfig(forward_only=True, model_dtype="fp32").model_dtype == "float32"


def test_stock_configuration_is_left_alone_by_observe(activated: Any) -> None:
    from verl.workers.config import FSDPEngineConfig, RolloutConfig

    activated(mode="observe")
    assert FSDPEngineConfig().mixed_precision is None
    assert RolloutConfig(name="vllm").dtype == "bfloat16"


@pytest.mark.parametrize(("mode", "said"), [("fp16", 2), ("bf16", 0)])
def test_experts_that_will_be_slow_are_named_for_every_model_on_fsdp(
    activated: Any, compose: Callable[..., Any], tmp_path: Path, mode: str, said: int
) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from fp16_patch.verl.config.settings import slow_paths_of

    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    keys = ["actor_rollout_ref.model.path", "critic.model.path"]
    config = compose("algorithm.adv_estimator=gae", *(f"{key}={tmp_path}" for key in keys))
    found = slow_paths_of(config, activated(mode=mode))
    assert [sentence.partition(":")[0] for sentence in found] == keys[:said]
