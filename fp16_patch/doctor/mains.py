"""The programs of the frameworks, by name: which are examined, and what to use instead of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from fp16_patch.doctor.launchers import Program
from fp16_patch.plan.errors import Conflict

_OBSERVE = "FP16_PATCH=observe to start it unchanged"
_NOT_UNDER_US = "start it without `fp16-patch run`"


@dataclass(frozen=True)
class Main:
    """A program of a framework.

    Attributes:
        framework: whose it is.
        refused: why it is not run under a plan; None if its command line is examined.
        fix: what to do instead.
        trains: whether it computes in a dtype that a plan would decide.
    """

    framework: str
    refused: str | None = None
    fix: str = ""
    trains: bool = True

    def conflict(self, program: Program) -> Conflict | None:
        """Say why the program is refused; None if it is examined."""
        return None if self.refused is None else Conflict("command", program.name, self.refused, self.fix)


def _own_trainer(instead: str) -> Main:
    reason = "its trainer is none that fp16_patch knows: no process would be checked, and the first step refused"
    return Main("verl", reason, f"use {instead}, or {_OBSERVE}")


def _untrained(framework: str, what: str, fix: str = _NOT_UNDER_US) -> Main:
    return Main(framework, f"it {what}, and trains nothing", fix, trains=False)


_PPO = "verl.trainer.main_ppo"
_DAPO = f"{_PPO} with algorithm.filter_groups, from verl 0.9.0 on"
_FULLY_ASYNC = "verl.experimental.fully_async_policy.fully_async_main"
_ONE_STEP_OFF = "verl.experimental.one_step_off_policy.main_ppo"
_SFT = "verl.trainer.sft_trainer"
_FORMER_SFT = Main(
    "verl",
    "this trainer, of releases before 0.8.0, computes in bfloat16 under autocast, and scales no loss",
    f"use {_SFT} of verl 0.8.0 or newer, or {_NOT_UNDER_US}",
)
_UNTRIED = Main(
    "openrlhf",
    "it was never run under a plan, and its log would hold neither loss scale nor skipped steps",
    f"{_NOT_UNDER_US}, or use train_sft, train_dpo or train_rm",
)

MAINS: dict[str, Main] = {
    _PPO: Main("verl"),
    "verl.trainer.main_ppo_sync": Main(
        "verl",
        "its trainer is a part of the program itself, which Ray sends to its process by value: nothing checks it there",
        f"use {_PPO}, or {_OBSERVE}",
    ),
    "verl.trainer.main_ppo_v0": Main(
        "verl", "it is a part of main_ppo, and starts nothing by itself", f"use {_PPO} trainer.use_v1=False"
    ),
    _FULLY_ASYNC: Main("verl"),
    _ONE_STEP_OFF: Main("verl"),
    "verl.experimental.vla.main_ppo": _own_trainer(_PPO),
    "verl.experimental.vla.main_sac": _own_trainer(_PPO),
    _SFT: Main("verl"),
    f"{_SFT}_ray": Main("verl"),
    "verl.trainer.fsdp_sft_trainer": _FORMER_SFT,
    "verl.trainer.main_generation": _untrained("verl", "generates"),
    "verl.trainer.main_generation_server": _untrained("verl", "generates"),
    "verl.trainer.main_eval": _untrained("verl", "scores what was generated"),
    "verl.model_merger": Main("verl", trains=False),
    "scripts.converter_hf_to_mcore": _untrained("verl", "converts weights"),
    "recipe.dapo.main_dapo": _own_trainer(_DAPO),
    "recipe.fully_async_policy.fully_async_main": _own_trainer(f"{_FULLY_ASYNC} of verl 0.8.0 or newer"),
    "recipe.one_step_off_policy.main_ppo": _own_trainer(f"{_ONE_STEP_OFF} of verl 0.8.0 or newer"),
    "examples.split_placement.main_ppo_split": _own_trainer(_PPO),
    "openrlhf.cli.train_ppo_ray": Main("openrlhf"),
    "openrlhf.cli.train_sft": Main("openrlhf"),
    "openrlhf.cli.train_dpo": Main("openrlhf"),
    "openrlhf.cli.train_rm": Main("openrlhf"),
    "openrlhf.cli.train_kd": _UNTRIED,
    "openrlhf.cli.train_kto": _UNTRIED,
    "openrlhf.cli.train_prm": _UNTRIED,
    "openrlhf.cli.batch_inference": _untrained("openrlhf", "generates or scores"),
    "openrlhf.cli.interactive_chat": _untrained("openrlhf", "generates"),
    "openrlhf.cli.lora_combiner": _untrained("openrlhf", "merges weights"),
    "openrlhf.cli.serve_rm": _untrained("openrlhf", "serves rewards"),
}
# A framework's checkout has these folders at its root, from where a program is named.
_ROOTS = ("verl", "recipe", "examples", "scripts", "openrlhf")
# What lies in these folders, beside what is named above.
_FOLDERS = {"recipe.": _own_trainer(_PPO), "examples.data_preprocess.": _untrained("verl", "prepares data")}


def main_of(program: Program) -> Main | None:
    """Find the row of a program; None if it is no framework's."""
    name = dotted_name(program)
    if name in MAINS:
        return MAINS[name]
    if (folder := next((row for row in _FOLDERS if name.startswith(row)), None)) is not None:
        return _FOLDERS[folder]
    named = [main for key, main in MAINS.items() if "." not in name and key.endswith(f".{name}")]
    return named[0] if len(named) == 1 and len(name) else None


def dotted_name(program: Program) -> str:
    """Name a program as a module of a framework, also where a script's path is given."""
    if program.name is None:
        return ""
    if program.is_module:
        return program.name
    parts = PurePath(program.name).with_suffix("").parts
    roots = [index for index, part in enumerate(parts) if part in _ROOTS]
    return ".".join(parts[roots[-1] :] if roots else parts[-1:])
