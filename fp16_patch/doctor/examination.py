"""Decides whether this machine, and a command line, are fit for the plan: collects facts and judges each."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from fp16_patch.doctor.devices import devices
from fp16_patch.doctor.launchers import Program, program_of
from fp16_patch.doctor.mains import Main, dotted_name, main_of
from fp16_patch.patching.declarations import declared_patches, installed_release
from fp16_patch.plan.errors import Conflict, PlanError, SourceError
from fp16_patch.plan.plan import ENVIRONMENT, MODE_ENV, PLAN_ENV, Plan, settings_in
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.vllm.sampler import VLLM

PACKAGES = ("torch", "transformers", "ray", "verl", "vllm", "sglang", "openrlhf", "deepspeed", "wrapt")
_FRAMEWORKS = ("verl", "openrlhf")
_NEEDS = {"verl": ("torch", "transformers", "ray"), "openrlhf": ("torch", "transformers", "ray", "deepspeed")}
_SHOWN_WORDS = 4
_PLUGIN = "fp16_patch"
# Variables that say which plugins a framework or a sampler loads.
_PLUGIN_LISTS = ("VERL_USE_EXTERNAL_PLUGINS", "VLLM_PLUGINS", SGLANG.plugins)


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
        caveats: what does not keep the run from training, and should be known before it is started.
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
    program = program_of(command)
    plan = _plan_of(program, plan)
    examination = _examine_machine(plan, {**os.environ, **program.environment})
    examination.problems.extend(map(str, program.problems))
    main = main_of(program)
    if main is not None:
        _examine_command(examination, program, main, plan)
    elif command:
        examination.problems.append(str(_unknown_program(command)))
    return examination


def _plan_of(program: Program, plan: Plan) -> Plan:
    """Put over the plan what the command line sets on the way, as `env FP16_PATCH=bf16` does."""
    settings = settings_in(program.environment)
    if program.mode is not None:
        settings["mode"] = program.mode
    return Plan.from_settings(settings, ENVIRONMENT, base=plan) if settings else plan


def _examine_machine(plan: Plan, environ: Mapping[str, str]) -> Examination:
    verdicts = [patch.verify() for patch in declared_patches()]
    problems = [str(verdict) for verdict in verdicts if verdict.unknown]
    versions = {name: _release(name) for name in PACKAGES}
    if not any(versions[name] for name in _FRAMEWORKS):
        fix = " or ".join(map(_extra, _FRAMEWORKS))
        problems.insert(0, f"neither verl nor OpenRLHF is installed here. Fix: pip install {fix}")
    concerned = [verdict for verdict in verdicts if versions.get(verdict.patch.framework)]
    patches = {verdict.patch.name: str(verdict) for verdict in concerned}
    examination = Examination(plan.mode, problems, versions, devices(), patches)
    problems += [str(conflict) for conflict in _hardware_conflicts(examination.hardware, plan)]
    problems += [str(conflict) for conflict in _loading_conflicts(environ)]
    return examination


def configured_settings(command: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the plan's settings that a training command configures, and the name of the section they are in.

    Only verl's configuration has such a section.

    Raises:
        PlanError: this is not a command line of verl or OpenRLHF, its framework is not installed, or hydra rejects it.
    """
    program = program_of(command)
    main = main_of(program)
    if main is None:
        raise PlanError([_unknown_program(command)])
    if _release(main.framework) is None:
        reason, fix = f"it runs {main.framework}, which is not installed here", f"pip install {_extra(main.framework)}"
        raise PlanError([Conflict("command", program.name, reason, fix)])
    if main.framework != "verl":
        return {}, ENVIRONMENT
    with _only_asked():
        config = _composed(program)
        from fp16_patch.verl.config import settings

        return settings.plan_settings(config), settings.SECTION


def _examine_command(examination: Examination, program: Program, main: Main, plan: Plan) -> None:
    if examination.versions[main.framework] is None:
        fix = f"Fix: pip install {_extra(main.framework)}"
        problem = f"{main.framework} is not installed here, but the command runs it. {fix}"
        examination.problems.insert(0, problem)
        return
    refused = main.conflict(program)
    if refused is not None and plan.overrides_dtype:
        examination.problems.append(str(refused))
    elif refused is not None and plan.active:
        examination.caveats.append(f"nothing of this run is measured: fp16_patch does not know {program.name}")
    if refused is not None or not main.trains:
        return
    try:
        with _only_asked():
            (_examine_openrlhf if main.framework == "openrlhf" else _examine_verl)(examination, program, plan)
    except PlanError as refusal:
        examination.problems.extend(map(str, refusal.conflicts))
    except SourceError as problem:
        examination.problems.append(str(problem))
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith("fp16_patch"):
            raise
        fix = f"Fix: pip install {_extra(main.framework)}"
        examination.problems.insert(0, f"{missing.name} is not installed here, which the command needs. {fix}")
        return
    examination.problems[:0] = _absent(main.framework, examination.versions)


def _unknown_program(command: Sequence[str]) -> Conflict:
    shown = shlex.join([*command[:_SHOWN_WORDS]]) + (" …" if len(command) > _SHOWN_WORDS else "")
    fix = (
        "give a training command as you run it, python -m verl.trainer.main_ppo key=value … or "
        "python -m openrlhf.cli.train_ppo_ray …; what does not train needs no `fp16-patch run`"
    )
    return Conflict("command", shown, "not a command line of verl or OpenRLHF", fix)


def _absent(framework: str, versions: Mapping[str, str | None]) -> list[str]:
    return [
        f"{name} is not installed here, which {framework} runs on. Fix: pip install {name}, in a release that it takes"
        for name in _NEEDS[framework]
        if versions[name] is None
    ]


def _examine_sampler(examination: Examination, sampler: Sampler, plan: Plan) -> None:
    """Say first if a command's sampler is missing or cannot be asked, and at the end if it is one that was not run."""
    release = examination.versions[sampler.name]
    found = sampler.interface.finding(release) if plan.active else None
    if found is not None and found.fatal and (plan.overrides_dtype or release is None):
        examination.problems.insert(0, found.text)
    elif found is not None:
        examination.caveats.append(found.text)


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


def _examine_openrlhf(examination: Examination, program: Program, plan: Plan) -> None:
    from fp16_patch.openrlhf.config import arguments, caveats, parser

    args = parser.parsed(dotted_name(program), program.arguments)
    _judge(examination, arguments, args, caveats.caveats_of(args), plan)
    if "rollout" in examination.roles:
        _examine_sampler(examination, VLLM, plan)


def _examine_verl(examination: Examination, program: Program, plan: Plan) -> None:
    from fp16_patch.verl.config import caveats, settings, supervised
    from fp16_patch.verl.config.samplers import samplers_of

    config = _composed(program)
    refined = Plan.from_settings(settings.plan_settings(config), settings.SECTION, base=plan)
    if supervised.is_supervised(config):
        _judge(examination, supervised, config, [], refined)
        return
    _judge(examination, settings, config, caveats.caveats_of(config), refined)
    for sampler in samplers_of(config):
        _examine_sampler(examination, sampler, refined)


def _judge(examination: Examination, by: ModuleType, run: Any, caveats: Sequence[str], plan: Plan) -> None:
    """Take in what a framework's module says of a run under the plan, and under none."""
    examination.stock_roles.update(by.effective_dtypes(run, Plan(mode="observe")))
    examination.roles.update(by.effective_dtypes(run, plan))
    examination.caveats.extend(f"the mismatch of this run {caveat}" for caveat in caveats)
    examination.caveats.extend(by.slow_paths_of(run, plan))
    if plan.overrides_dtype:
        examination.problems.extend(str(conflict) for conflict in by.conflicts_of(run, plan))
        examination.overridden.extend(by.apply_to(run, plan))


def _composed(program: Program) -> Any:
    """Compose the configuration of a command line of verl, without starting Ray."""
    from fp16_patch.verl.config.command_line import composed

    script = None if program.is_module else Path(str(program.name))
    return composed(dotted_name(program), program.arguments, script)


def _release(package: str) -> str | None:
    try:
        return installed_release(package) or version(package)
    except PackageNotFoundError:
        return None


def _hardware_conflicts(found: list[dict[str, Any]], plan: Plan) -> Iterator[Conflict]:
    for device in found:
        if plan.mode == "fp16" and not device["fp16"]:
            reason = f"{device['facts']} has no FP16 matrix units"
            yield Conflict("device", device["name"], reason, "use a GPU of compute capability 7.0 or later")


def _loading_conflicts(environ: Mapping[str, str]) -> Iterator[Conflict]:
    for variable in _PLUGIN_LISTS:
        value = environ.get(variable)
        if value is not None and not _lists_us(variable, value):
            started = ", or start with `fp16-patch run --`" if variable.startswith("VERL") else ""
            fix = f"add {_PLUGIN} to the list, or unset it{started}"
            yield Conflict(variable, value, "it keeps our plugin from being loaded", fix)


def _lists_us(variable: str, value: str) -> bool:
    if variable == SGLANG.plugins:
        # It takes an empty list for none, and blanks around names for nothing.
        return not value or _PLUGIN in map(str.strip, value.split(","))
    return value.strip().lower() == "auto" or _PLUGIN in value.split(",")
