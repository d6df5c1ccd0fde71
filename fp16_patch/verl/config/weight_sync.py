"""Judges how a run's weights reach its samplers: ways that round them, or leave out the adapters."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fp16_patch.patching.fingerprint import parsed
from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.verl.config.selection import Select

BACKEND = "actor_rollout_ref.rollout.checkpoint_engine.backend"
SAMPLER = "actor_rollout_ref.rollout.name"
MODEL = "actor_rollout_ref.model"
_COLOCATED = "naive"
# verl's wire for weight differences stores bf16 and its vLLM receiver accepts nothing else.
BF16_ONLY_WIRES = ("delta_sharded",)
# Sections that only the fully asynchronous and the one-step-off trainer have.
SEPARATE_SAMPLERS = ("async_training", "rollout")
_WORKER, _SENDS = "verl.workers.engine_workers", "ActorRolloutRefWorker.update_weights"


def weight_sync_conflicts(select: Select, plan: Plan) -> Iterator[Conflict]:
    """Yield why the run's samplers would not get the learner's weights as they are.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
    """
    wire = select(BACKEND)
    if wire in BF16_ONLY_WIRES and plan.dtype != "bfloat16":
        reason = "it sends weights in bfloat16 and vLLM's side accepts nothing else"
        yield Conflict(BACKEND, wire, reason, "use naive or nccl")
    if select(SAMPLER) == SGLANG.name and (adapter := _unmerged_adapter(select)):
        reason = f"with {adapter} it gets adapters by a way on which nobody sees in which dtype they arrive"
        yield Conflict(SAMPLER, SGLANG.name, reason, f"set {MODEL}.lora.merge=true, or use vllm")
    if _is_disaggregated(select) and (adapter := _unmerged_adapter(select)) and leaves_out_adapters(Installed()):
        reason = (
            f"with {adapter} it sends the base weights alone, and the sampler stays at the initial policy "
            "(verl-project/verl#7495)"
        )
        fix = f"set {MODEL}.lora.merge=true, or train with sampler and learner on the same devices ({BACKEND}=naive)"
        yield Conflict(BACKEND, wire, reason, fix)


def leaves_out_adapters(sources: Sources) -> bool:
    """Return whether the learner sends separate samplers what is not yet known of adapters: the base, at each sync.

    It reads the branch that hands weights to the checkpoint engine: there, adapters are sent to a sampler that has the
    base only if the engine is asked for them by `base_sync_done`.
    """
    function = parsed(sources.read(_WORKER) or "", _SENDS)
    branches = [node for node in ast.walk(function) if isinstance(node, ast.If)] if function else []
    sending = next((branch for branch in branches if any(map(_sends_weights, branch.body))), None)
    return sending is not None and not any("base_sync_done" in ast.unparse(each) for each in sending.body)


def _sends_weights(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "send_weights" for node in ast.walk(statement))


def _is_disaggregated(select: Select) -> bool:
    """Return whether samplers have devices of their own, to which a checkpoint engine sends weights."""
    if select(BACKEND) in (None, _COLOCATED):
        return False
    if any(select(section) is not None for section in SEPARATE_SAMPLERS):
        return True
    # This trainer sends them without a checkpoint engine in its other modes, whatever the backend.
    return not select("trainer.use_v1") or select("trainer.v1.trainer_mode") == "separate_async"


def _unmerged_adapter(select: Select) -> str | None:
    """Return the setting that asks for adapters, as it is typed; None if there are none, or if they go out merged."""
    if select(f"{MODEL}.lora.merge"):
        return None
    for key in (f"{MODEL}.lora.rank", f"{MODEL}.lora_rank"):
        if int(select(key) or 0) > 0:
            return f"{key}={select(key)}"
    path = select(f"{MODEL}.lora_adapter_path")
    return f"{MODEL}.lora_adapter_path={path}" if path else None
