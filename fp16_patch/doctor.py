"""Decides whether this machine, and a command line, are fit for the plan: collects facts and judges each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fp16_patch.patching.declarations import declared_patches, installed_release
from fp16_patch.plan.errors import Conflict, Fp16PatchError, PlanError
from fp16_patch.plan.plan import ENVIRONMENT, MODE_ENV, PLAN_ENV, Plan

PACKAGES = ("torch", "transformers", "ray", "verl", "vllm", "openrlhf", "deepspeed", "wrapt")
_MAIN_PPO = "verl.trainer.main_ppo"
_OPENRLHF = "openrlhf.cli."
_FRAMEWORKS = ("verl", "openrlhf")


@dataclass(frozen=True)
class Examination:
    """What the doctor found.

    Attributes:
        mode: the plan's.
        problems: reasons not to train, most important first; empty if it is fit.
        versions: package → installed release, or None.
        hardware: device name → whether it computes FP16 natively, and what is known of it.
        patches: patch → verdict.
        roles: role → dtype it will compute in, for the examined command line.
        stock_roles: the same without fp16_patch.
        overridden: keys of the command line's configuration that say something else than the plan.
        caveats: what the run would warn of.
    """

    mode: str
    problems: list[str]
    versions: dict[str, str | None]
    hardware: list[dict[str, Any]]
    patches: dict[str, str]
    roles: dict[str, str] = field(default_factory=dict)
    stock_roles: dict[str, str] = field(default_factory=dict)
    overridden: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"fit": self.fit, **asdict(self)}


def examine(plan: Plan, command: Sequence[str] = ()) -> Examination:
    """Check what is installed and, given a training command, what it configures. Starts nothing.

    Args:
        command: as for a shell, e.g. `python -m verl.trainer.main_ppo actor_rollout_ref.actor.strategy=fsdp2`.
    """
    verdicts = [patch.verify() for patch in declared_patches()]
    problems = [str(verdict) for verdict in verdicts if verdict.unknown]
    versions = {name: _release(name) for name in PACKAGES}
    if not any(versions[name] for name in _FRAMEWORKS):
        fix = " or ".join(map(_extra, _FRAMEWORKS))
        problems.append(f"neither verl nor OpenRLHF is installed here. Fix: pip install {fix}")
    concerned = [verdict for verdict in verdicts if versions.get(verdict.patch.framework)]
    patches = {verdict.patch.name: str(verdict) for verdict in concerned}
    examination = Examination(plan.mode, problems, versions, list(_devices()), patches)
    problems += [str(conflict) for conflict in _hardware_conflicts(examination.hardware, plan)]
    problems += [str(conflict) for conflict in _loading_conflicts()]
    if command:
        _examine_command(examination, list(command), plan)
    return examination


def compose_verl(command: list[str]) -> Any:
    """Compose the configuration of a `main_ppo` command line, without starting Ray.

    Raises:
        PlanError: this is not a verl command line, or hydra rejects it.
    """
    if _MAIN_PPO not in command:
        fix = f"give it as you run it: python -m {_MAIN_PPO} key=value …, or python -m {_OPENRLHF}train_ppo_ray …"
        raise PlanError([Conflict("command", " ".join(command), "not a command line of verl or OpenRLHF", fix)])
    arguments = command[command.index(_MAIN_PPO) + 1 :]
    options, overrides = _split_hydra_options(arguments)
    from hydra import compose, initialize_config_dir, initialize_config_module
    from hydra.errors import HydraException

    name = options.get("--config-name", "ppo_trainer")
    path = options.get("--config-path")
    where = (
        initialize_config_dir(str(Path(path).resolve()), version_base=None)
        if path
        else initialize_config_module("verl.trainer.config", version_base=None)
    )
    try:
        with where:
            return compose(config_name=name, overrides=overrides)
    except HydraException as problem:
        raise PlanError([Conflict("command", " ".join(arguments), str(problem), "mend the override")]) from problem


def configured_settings(command: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the plan's settings that a training command configures, and the name of the section they are in.

    Only verl's configuration has such a section.

    Raises:
        PlanError: this is not a command line of verl or OpenRLHF, or hydra rejects it.
    """
    if _framework_of(command) == "openrlhf":
        return {}, ENVIRONMENT
    with _only_asked():
        config = compose_verl(list(command))
        from fp16_patch.verl.config import settings

        return settings.plan_settings(config), settings.SECTION


def _examine_command(examination: Examination, command: list[str], plan: Plan) -> None:
    framework = _framework_of(command)
    if framework is not None and examination.versions[framework] is None:
        fix = f"Fix: pip install {_extra(framework)}"
        examination.problems.insert(0, f"{framework} is not installed here, but the command runs it. {fix}")
        return
    try:
        with _only_asked():
            (_examine_openrlhf if framework == "openrlhf" else _examine_verl)(examination, command, plan)
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith("fp16_patch"):
            raise
        fix = f"Fix: pip install {_extra(framework or 'verl')}"
        examination.problems.insert(0, f"{missing.name} is not installed here, which the command needs. {fix}")


def _framework_of(command: Sequence[str]) -> str | None:
    if _MAIN_PPO in command:
        return "verl"
    return "openrlhf" if any(word.startswith(_OPENRLHF) for word in command) else None


def _extra(name: str) -> str:
    return f"'fp16-patch[{name}]'"


@contextmanager
def _only_asked() -> Iterator[None]:
    """Let a framework's folder be imported without activating anything."""
    kept = {name: os.environ.pop(name, None) for name in (MODE_ENV, PLAN_ENV)}
    os.environ[MODE_ENV] = "off"
    try:
        yield
    finally:
        del os.environ[MODE_ENV]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _examine_openrlhf(examination: Examination, command: list[str], plan: Plan) -> None:
    from fp16_patch.openrlhf.config import arguments, parser

    main = next(index for index, word in enumerate(command) if word.startswith(_OPENRLHF))
    try:
        args = parser.parsed(command[main], command[main + 1 :])
    except Fp16PatchError as problem:
        examination.problems.append(str(problem))
        return
    examination.stock_roles.update(arguments.effective_dtypes(args, Plan(mode="observe")))
    examination.roles.update(arguments.effective_dtypes(args, plan))
    examination.caveats.extend(arguments.slow_paths_of(args, plan))
    if plan.overrides_dtype:
        examination.problems.extend(str(conflict) for conflict in arguments.conflicts_of(args, plan))
        examination.overridden.extend(arguments.apply_to(args, plan))


def _examine_verl(examination: Examination, command: list[str], plan: Plan) -> None:
    from fp16_patch.verl.config import settings

    try:
        config = compose_verl(command)
        refined = Plan.from_settings(settings.plan_settings(config), settings.SECTION, base=plan)
    except Fp16PatchError as problem:
        examination.problems.append(str(problem))
        return
    examination.stock_roles.update(settings.effective_dtypes(config, Plan(mode="observe")))
    examination.roles.update(settings.effective_dtypes(config, refined))
    examination.caveats.extend(settings.slow_paths_of(config, refined))
    if refined.overrides_dtype:
        examination.problems.extend(str(conflict) for conflict in settings.conflicts_of(config, refined))
        examination.overridden.extend(settings.apply_to(config, refined))


def _split_hydra_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    overrides = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--config"):
            name, _, value = argument.partition("=")
            options[name] = value or next(rest, "")
        else:
            overrides.append(argument)
    return options, overrides


def _release(package: str) -> str | None:
    try:
        return installed_release(package) or version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # FP16 matrix units came with compute capability 7.0; bfloat16 with 8.0.
        facts = f"compute capability {major}.{minor}"
        yield {"name": torch.cuda.get_device_name(index), "fp16": major >= 7, "facts": facts}
    if not torch.cuda.is_available():
        yield {"name": "CPU", "fp16": True, "facts": "no accelerator: FP16 is correct here, and slow"}


def _hardware_conflicts(devices: list[dict[str, Any]], plan: Plan) -> Iterator[Conflict]:
    for device in devices:
        if plan.mode == "fp16" and not device["fp16"]:
            reason = f"{device['facts']} has no FP16 matrix units"
            yield Conflict("device", device["name"], reason, "use a GPU of compute capability 7.0 or later")


def _loading_conflicts() -> Iterator[Conflict]:
    for variable, name in (("VERL_USE_EXTERNAL_PLUGINS", "fp16_patch"), ("VLLM_PLUGINS", "fp16_patch")):
        value = os.environ.get(variable)
        listed = value is None or value.strip().lower() == "auto" or name in value.split(",")
        if not listed:
            started = ", or start with `fp16-patch run --`" if variable.startswith("VERL") else ""
            fix = f"add {name} to the list, or unset it{started}"
            yield Conflict(variable, value, "it keeps our plugin from being loaded", fix)
