"""Which of verl's engines are trained with under the plan, with which settings, and why not with the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch import Plan

pytestmark = pytest.mark.verl

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture
def compose_megatron(compose: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *overrides: compose("model_engine=megatron", "algorithm.adv_estimator=gae", *overrides)


def conflicts(config: Any, **settings: Any) -> list[str]:
    from fp16_patch.verl.config.settings import conflicts_of

    return [str(conflict) for conflict in conflicts_of(config, Plan(**settings))]


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("torchtitan", "torchtitan engine computes in bfloat16, whatever its keys say, and never scales the loss"),
        ("veomni", "veomni engine computes in bfloat16, and never scales the loss"),
        ("automodel", "automodel engine computes in bfloat16 under autocast, and never scales the loss"),
        ("fsdp_turbo", "past the FSDP engine's scaler and autocast"),
        ("mindspeed", "patches Megatron for Ascend"),
        ("mindspeed_megatron", "patches Megatron for Ascend"),
        ("invented", "cannot vouch for this engine"),
    ],
)
def test_an_engine_that_would_train_wrongly_is_refused_by_name(
    activated: Any, compose: Callable[..., Any], engine: str, reason: str
) -> None:
    activated()
    (message,) = conflicts(compose(f"{ACTOR}.strategy={engine}"))
    assert message.startswith(f"{ACTOR}.strategy={engine}: ")
    assert reason in message
    assert "Fix: use fsdp, fsdp2 or megatron, or FP16_PATCH=observe" in message


def test_megatron_as_verl_configures_it_has_no_conflict(activated: Any, compose_megatron: Callable[..., Any]) -> None:
    activated()
    assert conflicts(compose_megatron()) == []


@pytest.mark.parametrize(
    ("override", "key", "value", "fix"),
    [
        (f"{ACTOR}.megatron.use_mbridge=False", f"{ACTOR}.megatron.use_mbridge", "False", "set it to true"),
        (f"{ACTOR}.optim.optimizer=muon", f"{ACTOR}.optim.optimizer", "muon", "use adam"),
        ("critic.optim.optimizer=sgd", "critic.optim.optimizer", "sgd", "use adam"),
        (
            "critic.megatron.use_distributed_optimizer=False",
            "critic.megatron.use_distributed_optimizer",
            "False",
            "set it to true",
        ),
        (
            f"+{ACTOR}.megatron.override_ddp_config.grad_reduce_in_fp32=False",
            f"{ACTOR}.megatron.override_ddp_config.grad_reduce_in_fp32",
            "False",
            "remove it",
        ),
        (
            f"+{ACTOR}.megatron.override_transformer_config.fp8=hybrid",
            f"{ACTOR}.megatron.override_transformer_config.fp8",
            "hybrid",
            "remove it",
        ),
        (f"{ACTOR}.megatron.use_megatron_fsdp=True", f"{ACTOR}.megatron.use_megatron_fsdp", "True", "set it to false"),
        (
            f"+{ACTOR}.optim.override_optimizer_config.loss_scale=128",
            f"{ACTOR}.optim.override_optimizer_config.loss_scale",
            "128",
            "remove it; fp16_patch.init_scale",
        ),
    ],
)
def test_what_megatron_cannot_do_in_float16_is_refused_with_key_value_and_fix(
    activated: Any, compose_megatron: Callable[..., Any], override: str, key: str, value: str, fix: str
) -> None:
    activated()
    message = next(each for each in conflicts(compose_megatron(override)) if each.startswith(f"{key}={value}: "))
    assert f"Fix: {fix}" in message


def test_an_optimizer_that_only_float16_excludes_may_train_in_bfloat16(
    activated: Any, compose_megatron: Callable[..., Any]
) -> None:
    activated(mode="bf16")
    assert conflicts(compose_megatron(f"{ACTOR}.optim.optimizer=sgd"), mode="bf16") == []


def test_megatron_does_not_compute_in_float32(activated: Any, compose_megatron: Callable[..., Any]) -> None:
    activated(mode="fp32")
    assert any("16 bits only" in message for message in conflicts(compose_megatron(), mode="fp32"))


def test_the_plan_is_written_where_megatrons_settings_are(activated: Any, compose_megatron: Callable[..., Any]) -> None:
    from fp16_patch.verl.config.settings import apply_to, effective_dtypes

    config, plan = compose_megatron("algorithm.use_kl_in_reward=True"), activated()
    changed = apply_to(config, plan)
    sections = (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref, config.critic)
    assert [section.megatron.dtype for section in sections] == ["float16"] * 3
    assert f"{ACTOR}.megatron.dtype: bfloat16 → float16" in changed
    assert not any("fsdp" in line for line in changed)
    assert set(effective_dtypes(config, Plan(mode="observe")).values()) == {"float16"}
