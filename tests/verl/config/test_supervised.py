"""What the plan makes of the configuration of verl's SFT trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp16_patch import Plan, PlanError
from fp16_patch.patching.sources import installed_file

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

from fp16_patch.verl.config import settings, supervised

if settings.has_legacy_workers():
    pytest.skip("the engine of this release is refused", allow_module_level=True)

MEGATRON = ("engine=megatron", "optim=megatron")
VEOMNI = ("engine=veomni", "optim=veomni")


@pytest.fixture
def composed() -> Callable[..., Any]:
    """The configuration that an SFT trainer's command line composes from these overrides."""
    from hydra import compose, initialize_config_module

    def compose_sft(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("sft_trainer_engine", overrides=list(overrides))

    return compose_sft


def conflicts(config: Any, **plan: Any) -> list[str]:
    return [str(conflict) for conflict in supervised.conflicts_of(config, Plan(**plan))]


def test_it_is_told_from_ppos(composed: Callable[..., Any], compose: Callable[..., Any]) -> None:
    assert supervised.is_supervised(composed())
    assert not supervised.is_supervised(compose())


@pytest.mark.parametrize("engine", [("engine.strategy=fsdp",), ("engine.strategy=fsdp2",), MEGATRON])
def test_what_verl_composes_has_no_conflict(composed: Callable[..., Any], engine: tuple[str, ...]) -> None:
    assert conflicts(composed(*engine)) == []


@pytest.mark.parametrize(
    ("overrides", "refused", "reason", "fix"),
    [
        (("engine.strategy=torchtitan",), "engine.strategy=torchtitan", "in bfloat16", "use fsdp, fsdp2 or megatron"),
        (("engine.qat.enable=True",), "engine.qat.enable=True", "quantized dtype", "set it to false"),
        (
            ("model.use_fused_kernels=True",),
            "model.use_fused_kernels=True",
            "torch kernels divide logits",
            "model.fused_kernel_options.impl_backend=triton",
        ),
        ((*MEGATRON, "engine.use_mbridge=False"), "engine.use_mbridge=False", "built for bfloat16", "set it to true"),
        ((*MEGATRON, "optim.optimizer=sgd"), "optim.optimizer=sgd", "precision-aware", "use adam"),
    ],
)
def test_what_cannot_be_float16_is_refused_by_the_key_that_is_typed(
    composed: Callable[..., Any], overrides: tuple[str, ...], refused: str, reason: str, fix: str
) -> None:
    (message,) = conflicts(composed(*overrides))
    assert message.startswith(f"{refused}: ")
    assert reason in message
    assert fix in message.partition("Fix: ")[2]
    assert "actor_rollout_ref" not in message


def test_the_settings_of_veomni_are_judged_where_they_are_here(composed: Callable[..., Any]) -> None:
    config = composed(*VEOMNI, "++engine.qat_implementation=fp8", "++optim.optimizer=anyprecision_adamw")
    messages = conflicts(config)
    keys = ["engine.qat_implementation=fp8", "optim.optimizer=anyprecision_adamw"]
    of_the_engine = [message for message in messages if message.startswith("engine.strategy=veomni: ")]
    assert of_the_engine or [message.partition(": ")[0] for message in messages] == keys


def test_flash_attention_is_refused_in_float32_with_this_trainers_keys(composed: Callable[..., Any]) -> None:
    (message,) = conflicts(composed(), mode="fp32")
    assert message.startswith("model.override_config.attn_implementation=flash_attention_2: ")
    assert "add +model.override_config.attn_implementation=sdpa, with model.use_remove_padding=False" in message


def test_a_quantized_model_is_refused(composed: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (message,) = conflicts(composed(f"model.path={tmp_path}"))
    assert message.startswith("model.path=")
    assert "would be trained so" in message


def test_what_is_refused_stops_the_run_under_a_plan_alone(composed: Callable[..., Any]) -> None:
    config = composed("engine.qat.enable=True")
    with pytest.raises(PlanError, match=r"engine\.qat\.enable"):
        supervised.check(config, Plan())
    supervised.check(config, Plan(mode="observe"))


def test_the_plan_is_written_and_what_said_otherwise_is_told(composed: Callable[..., Any]) -> None:
    config = composed("engine.model_dtype=bf16")
    changed = supervised.apply_to(config, Plan())
    engine = config.engine
    assert (engine.dtype, engine.model_dtype) == ("float16", "float32")
    assert engine.mixed_precision == settings.mixed_precision(Plan())
    assert changed == ["engine.dtype: bfloat16 → float16", "engine.model_dtype: bf16 → float32"]
    assert supervised.apply_to(config, Plan()) == []


def test_megatrons_dtype_is_written_and_nothing_of_fsdp(composed: Callable[..., Any]) -> None:
    config = composed(*MEGATRON)
    assert supervised.apply_to(config, Plan()) == ["engine.dtype: bfloat16 → float16"]
    assert "mixed_precision" not in config.engine


@pytest.mark.parametrize(
    ("overrides", "stock"), [((), "bfloat16"), (("+engine.mixed_precision.param_dtype=fp16",), "float16")]
)
def test_the_model_is_one_role(composed: Callable[..., Any], overrides: tuple[str, ...], stock: str) -> None:
    config = composed(*overrides)
    assert supervised.effective_dtypes(config, Plan()) == {"actor": "float16"}
    assert supervised.effective_dtypes(config, Plan(mode="observe")) == {"actor": stock}
    assert supervised.slow_paths_of(config, Plan()) == []


def test_the_former_trainer_is_not_in_these_releases() -> None:
    assert installed_file("verl.trainer.fsdp_sft_trainer") is None
