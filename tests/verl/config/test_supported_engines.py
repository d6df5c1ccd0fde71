"""Which of verl's engines are trained with under the plan, with which settings, and why not with the others."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.patching.fingerprint import parsed
from fp16_patch.patching.sources import Installed

pytestmark = pytest.mark.verl

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
VEOMNI_ENGINE, TURBO_ENGINE = "verl.workers.engine.veomni.transformer_impl", "verl.workers.engine.fsdp.fsdp_turbo_impl"
TELLS_VEOMNI = "MixedPrecisionConfig" in (Installed().read(VEOMNI_ENGINE) or "")
takes_dtypes = pytest.mark.skipif(not TELLS_VEOMNI, reason="this release can tell VeOmni of no dtype")
takes_no_dtypes = pytest.mark.skipif(TELLS_VEOMNI, reason="this release tells VeOmni of a dtype")


def source_of(module: str, name: str) -> str:
    """A function of the installed verl, as Python writes it."""
    function = parsed(Installed().read(module) or "", name)
    assert function is not None, f"{module}:{name}"
    return ast.unparse(function)


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
        ("automodel", "automodel engine computes in bfloat16 under autocast, and never scales the loss"),
        ("fsdp_turbo", "leaves the engine's autocast at bfloat16 and its scaler at None: it never scales the loss"),
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


@pytest.mark.skipif(not Installed().read(TURBO_ENGINE), reason="this release has no such engine")
def test_fsdp_turbo_is_what_its_refusal_says() -> None:
    build = source_of(TURBO_ENGINE, "FSDPTurboEngineWithLMHead._build_fsdp_module")
    assert "FSDPTurbo(self.fsdp_turbo_config, module)" in build
    assert "scaler" not in build
    assert "autocast" not in build
    made = source_of("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.__init__")
    assert "self._autocast_dtype = torch.bfloat16" in made
    assert "self.scaler = None" in made


@pytest.fixture
def compose_veomni(compose: Callable[..., Any]) -> Callable[..., Any]:
    both = ("algorithm.adv_estimator=gae", "algorithm.use_kl_in_reward=True")
    return lambda *overrides: compose("model_engine=veomni", *both, *overrides)


@takes_dtypes
def test_veomni_as_verl_configures_it_has_no_conflict(activated: Any, compose_veomni: Callable[..., Any]) -> None:
    activated()
    assert conflicts(compose_veomni()) == []


@takes_no_dtypes
def test_an_engine_that_can_tell_veomni_no_dtype_is_refused(activated: Any, compose: Callable[..., Any]) -> None:
    activated()
    (message,) = conflicts(compose(f"{ACTOR}.strategy=veomni"))
    assert "shards for bfloat16 in parallelize_model_fsdp2 and takes no other dtype" in message


@takes_dtypes
@pytest.mark.parametrize(
    ("override", "key", "value", "fix"),
    [
        (f"{ACTOR}.veomni.qat_implementation=fp8_blockwise", f"{ACTOR}.veomni.qat_implementation", "fp8_blockwise", ""),
        ("critic.veomni.mhc_implementation=tilelang", "critic.veomni.mhc_implementation", "tilelang", "use eager"),
        (f"{REF}.veomni.dsa_attention_implementation=tilelang", f"{REF}.veomni.dsa_attention_implementation", "", ""),
        (f"{ACTOR}.optim.optimizer=anyprecision_adamw", f"{ACTOR}.optim.optimizer", "", "use adamw"),
        (
            "actor_rollout_ref.model.use_fused_kernels=True",
            "actor_rollout_ref.model.use_fused_kernels",
            "True",
            "set it to false",
        ),
    ],
)
def test_what_veomni_cannot_do_in_float16_is_refused_with_key_value_and_fix(
    activated: Any, compose_veomni: Callable[..., Any], override: str, key: str, value: str, fix: str
) -> None:
    activated()
    (message,) = conflicts(compose_veomni(f"++{override}"))
    assert message.startswith(f"{key}={value}")
    assert f"Fix: {fix}" in message


@takes_dtypes
def test_kernels_that_take_bfloat16_only_may_be_had_in_bfloat16(
    activated: Any, compose_veomni: Callable[..., Any]
) -> None:
    activated(mode="bf16")
    assert conflicts(compose_veomni("critic.veomni.mhc_implementation=tilelang"), mode="bf16") == []


@takes_dtypes
def test_flash_attention_is_refused_in_float32(activated: Any, compose_veomni: Callable[..., Any]) -> None:
    activated(mode="fp32")
    roles = (ACTOR, REF, "critic")
    found = conflicts(compose_veomni(), mode="fp32")
    assert [message.partition("=")[0] for message in found] == [f"{role}.veomni.attn_implementation" for role in roles]
    chosen = [f"{role}.veomni.attn_implementation=sdpa" for role in roles]
    assert conflicts(compose_veomni(*chosen), mode="fp32") == []


@takes_dtypes
def test_veomnis_masters_are_written_into_its_settings(activated: Any, compose_veomni: Callable[..., Any]) -> None:
    from fp16_patch.verl.config.settings import apply_to, effective_dtypes

    config, plan = compose_veomni(f"{ACTOR}.veomni.mixed_precision=False"), activated()
    changed = apply_to(config, plan)
    sections = (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref, config.critic)
    assert [section.veomni.mixed_precision for section in sections] == [True] * 3
    assert f"{ACTOR}.veomni.mixed_precision: False → True" in changed
    assert not any("fsdp" in line for line in changed)
    roles = effective_dtypes(config, Plan(mode="observe"))
    assert [roles[role] for role in ("actor", "ref", "critic")] == ["bfloat16"] * 3


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
        (
            f"+{ACTOR}.megatron.override_transformer_config.fp4=e2m1",
            f"{ACTOR}.megatron.override_transformer_config.fp4",
            "e2m1",
            "remove it",
        ),
        (
            f"+{ACTOR}.megatron.override_transformer_config.cuda_graph_impl=local",
            f"{ACTOR}.megatron.override_transformer_config.cuda_graph_impl",
            "local",
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
