"""What a GPU's kernels cannot compute in the plan's dtype is refused before a worker starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fp16_patch import Plan

pytestmark = pytest.mark.verl

POLICY = "actor_rollout_ref.model.override_config.attn_implementation"
SDPA = f"+{POLICY}=sdpa"
WITHOUT_CRITIC = "algorithm.adv_estimator=grpo"
ROLLOUT = "actor_rollout_ref.rollout.engine_kwargs.vllm.all2all_backend"


def conflicts(config: Any, **settings: Any) -> list[str]:
    from fp16_patch.verl.config.settings import conflicts_of

    return [str(conflict) for conflict in conflicts_of(config, Plan(**settings))]


def test_float32_on_verls_defaults_is_refused_as_flash_attention_takes_half_only(
    activated: Any, compose: Callable[..., Any]
) -> None:
    activated(mode="fp32")
    (message,) = conflicts(compose(WITHOUT_CRITIC), mode="fp32")
    assert message.startswith(f"{POLICY}=flash_attention_2: flash attention takes float16 and bfloat16 only. Fix: ")
    assert f"add {SDPA}, with actor_rollout_ref.model.use_remove_padding=False" in message


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_so_is_any_flash_attention_that_is_asked_for(
    activated: Any, compose: Callable[..., Any], implementation: str
) -> None:
    activated(mode="fp32")
    (message,) = conflicts(compose(WITHOUT_CRITIC, f"+{POLICY}={implementation}"), mode="fp32")
    assert message.startswith(f"{POLICY}={implementation}: ")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_takes_float32_is_not(activated: Any, compose: Callable[..., Any], implementation: str) -> None:
    activated(mode="fp32")
    assert conflicts(compose(WITHOUT_CRITIC, f"+{POLICY}={implementation}"), mode="fp32") == []


def test_a_critic_in_float32_is_refused_whatever_its_key_says(activated: Any, compose: Callable[..., Any]) -> None:
    activated(mode="fp32")
    asked = ("algorithm.adv_estimator=gae", SDPA, "+critic.model.override_config.attn_implementation=sdpa")
    (message,) = conflicts(compose(*asked), mode="fp32")
    assert message.startswith("critic.model.override_config.attn_implementation=flash_attention_2: ")
    assert "verl writes it in for critics" in message
    assert "Fix: use an algorithm without a critic" in message


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_half_dtypes_may_use_it(activated: Any, compose: Callable[..., Any], mode: str) -> None:
    activated(mode=mode)
    assert conflicts(compose("algorithm.adv_estimator=gae"), mode=mode) == []


class Release:
    """Sources of a verl that says what a test wants."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def read(self, module: str) -> str | None:
        return self.modules.get(module)


def test_a_release_that_does_not_read_the_key_cannot_compute_in_float32() -> None:
    from fp16_patch.verl.config.kernel_limits import attention_conflicts

    written_in = Release({"verl.workers.fsdp_workers": 'attn_implementation="flash_attention_2"'})
    settings = {POLICY: "sdpa"}
    (conflict,) = attention_conflicts(settings.get, ["actor_rollout_ref.actor"], Plan(mode="fp32"), written_in)
    assert "this verl writes it in" in str(conflict)
    reading = Release({"verl.workers.fsdp_workers": 'config.get("attn_implementation", "flash_attention_2")'})
    assert not list(attention_conflicts(settings.get, ["actor_rollout_ref.actor"], Plan(mode="fp32"), reading))


def test_a_release_that_lets_a_critic_choose_may_train_it() -> None:
    from fp16_patch.verl.config.kernel_limits import attention_conflicts

    roles = ["actor_rollout_ref.actor", "critic"]
    release = Release({"verl.workers.config.model": 'get("attn_implementation"', "verl.utils.model": "def load(): ..."})
    assert not list(attention_conflicts({POLICY: "sdpa"}.get, roles, Plan(mode="fp32"), release))


@pytest.mark.parametrize("key", [ROLLOUT, "reward.reward_model.rollout.engine_kwargs.vllm.all2all_backend"])
def test_experts_that_exchange_tokens_in_bfloat16_only_are_refused(
    activated: Any, compose: Callable[..., Any], key: str
) -> None:
    activated()
    rewarded = ("reward.reward_model.enable=True", "reward.reward_model.rollout.name=vllm")
    (message,) = conflicts(compose(f"+{key}=deepep_low_latency", *rewarded))
    assert message.startswith(f"{key}=deepep_low_latency: ")
    assert "Fix: use allgather_reducescatter" in message
    assert conflicts(compose(f"+{key}=deepep_low_latency", *rewarded), mode="bf16") == []
    assert conflicts(compose(f"+{key}=naive", *rewarded)) == []
    dashed = key.replace("all2all_backend", "all2all-backend")
    assert conflicts(compose(f"+{dashed}=deepep_low_latency", *rewarded))[0].startswith(f"{dashed}=")


def test_so_are_those_of_a_reward_model_that_is_configured_where_it_was_up_to_0_7(
    activated: Any, compose: Callable[..., Any]
) -> None:
    activated()
    key = "reward_model.rollout.engine_kwargs.vllm.all2all_backend"
    named = ("+reward_model.enable=True", "reward.reward_model.rollout.name=vllm")
    (message,) = conflicts(compose(f"+{key}=deepep_low_latency", *named))
    assert message.startswith(f"{key}=deepep_low_latency: ")


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [("moe_enable_deepep", "True", "set it to false"), ("moe_token_dispatcher_type", "flex", "use alltoall")],
)
def test_so_are_megatrons(activated: Any, compose: Callable[..., Any], key: str, value: str, fix: str) -> None:
    activated()
    key = f"actor_rollout_ref.actor.megatron.override_transformer_config.{key}"
    config = compose("model_engine=megatron", f"+{key}={value}")
    message = next(each for each in conflicts(config) if each.startswith(f"{key}={value}: "))
    assert f"Fix: {fix}" in message
    assert conflicts(config, mode="bf16") == []
