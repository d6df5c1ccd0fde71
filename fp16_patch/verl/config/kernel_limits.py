"""Refuses what a GPU's kernels cannot compute in the plan's dtype, before a worker meets them in its first forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import is_half
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import MODE_ENV, Plan
from fp16_patch.verl.config.selection import Select

_POLICY, _CRITIC = "actor_rollout_ref.model", "critic.model"
_ATTENTION = "override_config.attn_implementation"
# verl's own choice where nobody makes one.
_FLASH = "flash_attention_2"
_TAKES_HALF_ONLY = "flash attention takes float16 and bfloat16 only"
_WRITTEN_IN = f'attn_implementation="{_FLASH}"'
_WITHOUT_CRITIC = f"use an algorithm without a critic, as algorithm.adv_estimator=grpo, or {MODE_ENV}=bf16"
# Modules of verl that read the key, each where it is there.
_READERS = ("verl.workers.config.model", "verl.workers.fsdp_workers")


def attention_conflicts(
    select: Select, fsdp_roles: Iterable[str], plan: Plan, sources: Sources | None = None
) -> Iterator[Conflict]:
    """Yield the models that would meet flash attention in FP32.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        fsdp_roles: keys of the roles whose models transformers builds, as `actor_rollout_ref.actor`.
        sources: verl's; by default the installed one's.
    """
    roles, verl = list(fsdp_roles), sources or Installed()
    if is_half(plan.dtype):
        return
    if "critic" in roles and _WRITTEN_IN in (verl.read("verl.utils.model") or ""):
        key = f"{_CRITIC}.{_ATTENTION}"
        yield Conflict(key, _FLASH, f"{_TAKES_HALF_ONLY}, and verl writes it in for critics", _WITHOUT_CRITIC)
    if roles == ["critic"] or not roles:
        return
    key = f"{_POLICY}.{_ATTENTION}"
    if not _reads_the_key(verl):
        yield Conflict(key, _FLASH, f"{_TAKES_HALF_ONLY}, and this verl writes it in", f"use {MODE_ENV}=bf16")
    elif (chosen := str(select(key) or _FLASH)).startswith("flash"):
        fix = f"add +{key}=sdpa, with {_POLICY}.use_remove_padding=False"
        yield Conflict(key, chosen, _TAKES_HALF_ONLY, fix)


def _reads_the_key(verl: Sources) -> bool:
    return any('get("attn_implementation"' in (verl.read(module) or "") for module in _READERS)
