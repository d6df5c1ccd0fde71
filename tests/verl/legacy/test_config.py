"""What the plan makes of the configuration that workers of before 0.8.0 are built from, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from fp16_patch import Plan, PlanError
from fp16_patch.patching.declarations import declared_patches

pytestmark = pytest.mark.verl
pytest.importorskip("verl")
if find_spec("verl.workers.fsdp_workers") is None:
    pytest.skip("verl 0.8.0 and newer have no such workers", allow_module_level=True)

SECTIONS = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.model.fsdp_config")
MIXED = {"param_dtype": "float16", "reduce_dtype": "float32", "buffer_dtype": "float32"}


@pytest.fixture
def gae(compose: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *overrides: compose(
        "algorithm.adv_estimator=gae", "actor_rollout_ref.actor.use_kl_loss=true", *overrides
    )


def test_every_role_is_told_the_plans_dtype(activated: Any, gae: Callable[..., Any]) -> None:
    from omegaconf import OmegaConf

    activated(strict=False)
    from fp16_patch.verl.config.settings import apply_to

    config = gae()
    apply_to(config, Plan())
    assert config.actor_rollout_ref.rollout.dtype == "float16"
    for section in SECTIONS:
        assert OmegaConf.select(config, section).mixed_precision == MIXED
        assert OmegaConf.select(config, section).model_dtype == "float32"


def test_verl_builds_its_workers_from_what_the_plan_wrote(activated: Any, gae: Callable[..., Any]) -> None:
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    activated(strict=False)
    from fp16_patch.verl.config.settings import apply_to

    config = gae()
    apply_to(config, Plan())
    for section in SECTIONS:
        node = OmegaConf.select(config, section)
        built = omega_conf_to_dataclass(node) if "_target_" in node else node
        assert built.get("mixed_precision")["param_dtype"] == "float16"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.use_legacy_worker_impl=disable", "trainer.use_legacy_worker_impl"),
        ("actor_rollout_ref.model.use_fused_kernels=True", "actor_rollout_ref.model.use_fused_kernels"),
        ("actor_rollout_ref.rollout.name=hf", "actor_rollout_ref.rollout.name"),
    ],
)
def test_what_computes_in_bfloat16_or_returns_log_probs_in_float16_is_refused(
    activated: Any, gae: Callable[..., Any], override: str, key: str
) -> None:
    activated(strict=False)
    from fp16_patch.verl.config.settings import check

    with pytest.raises(PlanError, match=key.replace(".", r"\.")):
        check(gae(override), Plan())


@pytest.mark.parametrize("name", ["legacy-engine", "legacy-sft"])
def test_engine_and_supervised_trainer_are_refused(activated: Any, name: str) -> None:
    verdict = next(patch for patch in declared_patches() if patch.name == name).verify()
    if verdict.exemption is not None:
        pytest.skip(str(verdict))
    activated(strict=False)
    module = pytest.importorskip(verdict.variant.module, reason="it needs packages that are not there")
    owner = getattr(module, verdict.variant.qualname.partition(".")[0])
    with pytest.raises(PlanError, match="scales no loss"):
        owner()
