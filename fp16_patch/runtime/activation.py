"""Turns a plan on in this process, once and in any order of imports, and off again."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fp16_patch.patching.apply import PatchSet
from fp16_patch.patching.import_hooks import refuse_import
from fp16_patch.plan.errors import Conflict, PatchError, PlanError
from fp16_patch.plan.guard import OurPart
from fp16_patch.plan.plan import MODE_ENV, PLAN_ENV, Plan
from fp16_patch.runtime import gemm_sums, propagation
from fp16_patch.runtime.ledger import Ledger, Record

logger = logging.getLogger(__name__)

# Of these every run of a framework imports one to train at all. Plugin loaders swallow exceptions, so a refusal is
# repeated here, each time, where the framework's own import statement passes it on.
_CANNOT_TRAIN_WITHOUT = (
    "verl.trainer.constants_ppo",  # in the launching process, before Ray
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.trainer.ppo.ray_trainer",
    "verl.workers.engine",
    "verl.workers.fsdp_workers",
    "verl.workers.megatron_workers",
    "openrlhf.models",
    "openrlhf.trainer",
    "openrlhf.utils.deepspeed",
    "openrlhf.utils.deepspeed.deepspeed",
)


class _State:
    """Holds this process's plan, patches and ledger."""

    def __init__(self) -> None:
        self.plan = Plan(mode="off")
        self.patches = PatchSet(())
        self.ledger = Ledger()
        self.sums = gemm_sums.SumsInFP32()
        self.inactive = "fp16_patch is not active in this process"
        self.refusal: Exception | None = None
        self.allow_training: Callable[[], None] = lambda: None
        """Takes the refusal back."""
        self.handler: logging.Handler = logging.StreamHandler()


_state = _State()


def activate(plan: Plan | None = None) -> Plan:
    """Compute as `plan` says in this process and in every process it starts from now on.

    Args:
        plan: the decision; by default the one carried by the environment, else what `FP16_PATCH` and
            `FP16_PATCH_<SETTING>` say, else FP16.

    Returns:
        The plan in force. Calling again with the same plan, or with none, changes nothing.

    Raises:
        PlanError: a setting is wrong, or another plan is in force already.
        PatchError: a framework's code is unknown to us and the plan is strict.
    """
    try:
        return _activate(plan)
    except Exception as problem:
        if not _state.plan.active:
            _refuse_to_train(problem)
        raise


def deactivate() -> None:
    """Take off every patch, forget the plan, and remove the environment variables set for children."""
    global _state
    _state.patches.undo()
    _state.allow_training()
    _state.sums.release()
    propagation.stop_carrying()
    _fall_silent()
    _state = _State()


def current_plan() -> Plan:
    """Return the plan in force in this process; one of mode `off` when there is none."""
    return _state.plan


def refusal() -> Exception | None:
    """Return why this process refuses to train; None where it does not."""
    return _state.refusal


def ledger() -> Ledger:
    """Return this process's ledger."""
    return _state.ledger


def attestation() -> Record:
    """Return this process's record: whether our patches are live here, and the dtypes seen."""
    _note_sums(_state.ledger)
    record = _state.ledger.record(_state.plan, _state.patches.report())
    if not _state.plan.active:
        record["problem"] = str(_state.refusal) if _state.refusal else _state.inactive
    return record


def our_part(what: str) -> OurPart:
    """Guard code of ours that a framework calls and that is no hook: under the plan in force, see `OurPart`."""
    return OurPart(logger, what, lambda: not _state.plan.overrides_dtype)


def owed_patches(framework: str, kind: str) -> tuple[str, ...]:
    """Name the patches that must be live in a process of this kind once it computes: its dtypes prove little else."""
    return _state.patches.owed(framework, kind)


def refine(settings: Mapping[str, Any], source: str) -> Plan:
    """Put a framework configuration's own `fp16_patch` settings over the plan in force, and carry the result.

    Raises:
        PlanError: a setting is unknown or wrong.
    """
    if "strict" in settings:
        fix = "set FP16_PATCH_STRICT=0 in the environment"
        key = f"{source}.strict"
        raise PlanError([Conflict(key, settings["strict"], "patches are checked before this is read", fix)])
    refined = Plan.from_settings(settings, source, base=_state.plan)
    if refined == _state.plan:
        return refined
    if refined.dtype != _state.plan.dtype:
        _reinstall(refined)
    _state.plan = refined
    propagation.carry(refined)
    return refined


def _activate(plan: Plan | None) -> Plan:
    if _state.plan.active:
        return _keep(plan)
    given, plan = plan, plan or Plan.from_environment(os.environ, default_mode="fp16")
    if not plan.active:
        if given is None and PLAN_ENV in os.environ:
            word = os.environ.get(MODE_ENV, plan.mode)
            _state.inactive = f"{MODE_ENV}={word} here counts, not the plan carried to this process"
            logger.warning("fp16_patch: %s; it computes as its framework does", _state.inactive)
        return plan
    propagation.check_carried()
    # In force before the first patch is applied: loading a hook imports its framework's folder, which activates.
    _state.plan = plan
    _speak_up()
    if given is not None and os.environ.get(PLAN_ENV, given.to_json()) != given.to_json():
        logger.warning("the plan given to activate() counts (mode %s), not the one carried to this process", plan.mode)
    try:
        _reinstall(plan)
    except Exception:
        _state.plan = Plan(mode="off")
        _state.sums.release()
        _fall_silent()
        raise
    # Whoever mends the cause of a refusal and activates in the same process is not held back.
    _state.allow_training()
    _state.refusal = None
    propagation.carry(plan)
    return plan


def _speak_up() -> None:
    # A handler of our own, as frameworks silence the root logger's and these lines are few.
    _state.handler = logging.StreamHandler(sys.stderr)
    _state.handler.setFormatter(logging.Formatter("fp16_patch: %(message)s"))
    ours = logging.getLogger("fp16_patch")
    ours.addHandler(_state.handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _fall_silent() -> None:
    ours = logging.getLogger("fp16_patch")
    ours.removeHandler(_state.handler)
    ours.setLevel(logging.NOTSET)
    ours.propagate = True


def _keep(plan: Plan | None) -> Plan:
    if plan not in (None, _state.plan):
        raise PlanError(
            [Conflict("fp16_patch", plan, f"{_state.plan} is in force already", "call fp16_patch.deactivate() first")]
        )
    return _state.plan


def _reinstall(plan: Plan) -> None:
    patches = PatchSet.of(plan)
    _state.patches.undo()
    patches.install()
    _state.patches = patches
    if plan.overrides_dtype:
        _state.sums.hold()
    else:
        _state.sums.release()


def _note_sums(noted: Ledger) -> None:
    """Note what every role's products may be added up in, as torch is set by now."""
    for role, row in noted.roles.items():
        # Not its weights: what a sampler keeps in FP32 meets no attention.
        operands = row.get("activation") or row.get("kv_cache") or ()
        noted.note(role, gemm_sums.QUANTITY, *gemm_sums.sums_of(operands, of_sampler="kv_cache" in row))


def _refuse_to_train(refusal: Exception) -> None:
    print(f"fp16_patch: refused, this process will not train: {refusal}", file=sys.stderr, flush=True)
    _state.allow_training()
    _state.refusal = refusal
    why = f"fp16_patch refused to run ({refusal}). Set {MODE_ENV}=off to train without it."
    _state.allow_training = refuse_import(
        _CANNOT_TRAIN_WITHOUT, lambda name: PatchError(f"{name} is not imported: {why}")
    )
