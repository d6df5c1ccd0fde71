"""The precision decision of a run: made once in the driver, carried unchanged to every process."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fp16_patch.plan import probe_settings
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.settings import DTYPE_OF_MODE, FIRST_SCALE, SETTINGS, Settings, problems_of
from fp16_patch.untrusted.reading import Unreadable, json_of
from fp16_patch.untrusted.text import quoted

if TYPE_CHECKING:
    import torch

MODE_ENV = "FP16_PATCH"
PLAN_ENV = "FP16_PATCH_PLAN"
SPOOL_ENV = "FP16_PATCH_SPOOL"
ROLE_ENV = "FP16_PATCH_ROLE"
KIND_ENV = "FP16_PATCH_KIND"
DRIVER_ENV = "FP16_PATCH_DRIVER"
TOLD_ENV = "FP16_PATCH_TOLD"
"""The variables that the carried plan was made under, as JSON: where one of them says the same, it says nothing new."""
# Between processes of one run; every other variable with our name in front is a setting.
OWN_VARIABLES = frozenset({PLAN_ENV, SPOOL_ENV, ROLE_ENV, KIND_ENV, DRIVER_ENV, TOLD_ENV})

ENVIRONMENT = "environment"
COMMAND_LINE = "--"
"""Where settings come from, as the `source` of `resolve`; any other source is a section of a configuration."""


@dataclass(frozen=True)
class Plan(Settings):
    """What every process computes in, how losses are scaled, what is checked, and what is measured.

    The settings are those of `fp16_patch.plan.settings.Settings`, each with its meaning.

    Raises:
        PlanError: a value is of the wrong kind or out of range; the message names setting, value and fix.
    """

    def __post_init__(self) -> None:
        if self.init_scale != FIRST_SCALE and self.first_scale == "measured":
            object.__setattr__(self, "first_scale", "fixed")
        _refuse_problems(vars(self), "fp16_patch")

    @property
    def active(self) -> bool:
        return self.mode != "off"

    @property
    def overrides_dtype(self) -> bool:
        """Whether the plan decides the dtype, rather than only watching."""
        return DTYPE_OF_MODE[self.mode] is not None

    @property
    def dtype(self) -> str | None:
        """Torch's name of the compute dtype (`float16`, …); None when the plan leaves it to the framework."""
        return DTYPE_OF_MODE[self.mode]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype.

        Raises:
            ValueError: the plan decides none.
        """
        import torch

        if self.dtype is None:
            raise ValueError(f"a plan of mode {self.mode!r} decides no dtype")
        return getattr(torch, self.dtype)

    @property
    def scales_loss(self) -> bool:
        return self.mode == "fp16"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that another process has carried here.

        Raises:
            PlanError: it is none, or one of another release of ours.
        """
        values = _mapping_in(PLAN_ENV, text)
        if others := sorted(values.keys() ^ SETTINGS.keys()):
            what = "lacks" if others[0] in SETTINGS else "has the unknown"
            reason = f"it {what} {quoted(others[0])}, so another release of fp16_patch carried it"
            raise unreadable_variable(PLAN_ENV, text, reason, "install the same one in every process's Python")
        parsed = _parse(values, PLAN_ENV)
        _refuse_problems(parsed, PLAN_ENV)
        # Complete as it is: what it was made of, a probe's result for one, need not be on this machine.
        return cls(**parsed)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str, base: Plan | None = None) -> Plan:
        """Make a plan from a mapping of setting → value, over the defaults or over `base`.

        Args:
            settings: values may be strings, as hydra and the environment give them.
            source: where the settings come from, for the message of an error.

        Raises:
            PlanError: an unknown setting, a value that does not parse or is out of range, or a probe that speaks
                against the plan.
        """
        return resolve(settings, source, base)[0]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, default_mode: str = "off") -> Plan:
        """Take the plan a parent process carried here, else the one of `FP16_PATCH` and `FP16_PATCH_<SETTING>`.

        Under a carried plan, `FP16_PATCH=off` leaves this process as it is, and is obeyed. Any other variable that says
        something else than the plan, and was not there where the plan was made, is refused: a job has one plan.

        Raises:
            PlanError: as `from_settings` does; also for a variable that would be a setting if there were one, for a
                variable that speaks against the carried plan, and for one that was carried here and cannot be read.
        """
        return resolve_environment(environ, default_mode)[0]


Origins = dict[str, str]
"""Setting → what its value was taken from; settings at their default are not in it."""


def resolve(settings: Mapping[str, Any], source: str, base: Plan | None = None) -> tuple[Plan, Origins]:
    """Make a plan as `Plan.from_settings` does, and say where each value that was set came from."""
    parsed = _parse(settings, source)
    origins = {name: as_given(name, source) for name in parsed}
    if "init_scale" in parsed:
        # Also where it is the default's value that is asked for.
        parsed["first_scale"], origins["first_scale"] = "fixed", origins["init_scale"]
    below = base or Plan()
    _refuse_problems({**vars(below), **parsed}, source)
    plan = replace(below, **parsed)
    applied_before = base is not None and base.scales_loss and "probe" not in parsed
    if plan.probe is None or not plan.scales_loss or applied_before:
        return plan, origins
    key = origins.get("probe", as_given("probe", ENVIRONMENT))
    advised = probe_settings.settings_of(plan.probe, key)
    measured = {name: value for name, value in advised.items() if name not in parsed}
    return replace(plan, **measured), {**origins, **dict.fromkeys(measured, plan.probe)}


def resolve_environment(environ: Mapping[str, str], default_mode: str) -> tuple[Plan, Origins]:
    """Make a plan as `Plan.from_environment` does, and say where each value that was set came from."""
    if PLAN_ENV in environ:
        return _carried(environ)
    return resolve(settings_in(environ), ENVIRONMENT, Plan(mode=default_mode))


def _carried(environ: Mapping[str, str]) -> tuple[Plan, Origins]:
    """Take the carried plan, unless this process was told another since."""
    try:
        plan, told = Plan.from_json(environ[PLAN_ENV]), told_in(environ)
    except PlanError:
        # No word of another process keeps one that is off from running.
        if environ.get(MODE_ENV) is not None and SETTINGS["mode"].parse(environ[MODE_ENV]) == "off":
            return Plan(mode="off"), {"mode": MODE_ENV}
        raise
    said = settings_in({name: value for name, value in words_in(environ).items() if told.get(name) != value})
    parsed = _parse(said, ENVIRONMENT)
    if parsed.get("mode") == "off":
        return Plan(mode="off"), {"mode": MODE_ENV}
    conflicts = [
        _against_the_carried(name, said[name], plan) for name, value in parsed.items() if getattr(plan, name) != value
    ]
    if conflicts:
        raise PlanError(conflicts)
    changed = [name for name, setting in SETTINGS.items() if getattr(plan, name) != setting.default]
    return plan, dict.fromkeys(changed, PLAN_ENV)


def _against_the_carried(name: str, value: str, plan: Plan) -> Conflict:
    carried = SETTINGS[name].show(getattr(plan, name))
    reason = f"the plan that was carried to this process says {carried}, and a job has one plan"
    fix = (
        "set it where the job is started, not here (nor where `ray start` is typed), or "
        f"{MODE_ENV}=off to leave this process as it is. A job of its own starts without {PLAN_ENV} in its environment"
    )
    return Conflict(as_given(name, ENVIRONMENT), value, reason, fix)


def words_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables there that say what the plan is to be: `FP16_PATCH` and `FP16_PATCH_<SETTING>`."""
    return {
        name: value
        for name, value in environ.items()
        if name == MODE_ENV or (name.startswith(f"{MODE_ENV}_") and name not in OWN_VARIABLES)
    }


def told_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the plan carried there was made under; none without one.

    Raises:
        PlanError: they cannot be read.
    """
    text = environ.get(TOLD_ENV, "{}")
    told = _mapping_in(TOLD_ENV, text)
    if not all(isinstance(value, str) for value in told.values()):
        raise unreadable_variable(TOLD_ENV, text, "it is not a mapping of variables to their values")
    return told


def _mapping_in(variable: str, text: str) -> dict[str, Any]:
    try:
        values = json_of(text)
    except Unreadable as problem:
        raise unreadable_variable(variable, text, str(problem)) from None
    if not isinstance(values, dict):
        raise unreadable_variable(variable, text, "it is not a mapping")
    return values


def unreadable_variable(variable: str, text: str, reason: str, fix: str = "") -> PlanError:
    """Make the error about a variable that processes of ours carry to each other, and that is not as they write it."""
    return PlanError([Conflict(variable, text, reason, fix or f"unset {variable}, which is not for settings")])


def as_given(name: str, source: str) -> str:
    """Spell a setting as the user did there."""
    if source == ENVIRONMENT:
        return MODE_ENV if name == "mode" else f"{MODE_ENV}_{name.upper()}"
    return f"--{name}" if source == COMMAND_LINE else f"{source}.{name}"


def settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return setting → value of the variables `FP16_PATCH` and `FP16_PATCH_<SETTING>`, as they are written there.

    Raises:
        PlanError: the mode is given by another variable than `FP16_PATCH`.
    """
    prefix = f"{MODE_ENV}_"
    words = words_in(environ)
    modes = {"mode": words.pop(MODE_ENV)} if MODE_ENV in words else {}
    settings = {name.removeprefix(prefix).lower(): value for name, value in words.items()}
    if "mode" in settings:
        conflict = Conflict(f"{prefix}MODE", settings["mode"], "fp16_patch has no such setting", f"set {MODE_ENV}")
        raise PlanError([conflict])
    return {**settings, **modes}


def _parse(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    parsed, conflicts = {}, []
    for name, value in settings.items():
        try:
            parsed[name] = SETTINGS[name].parse(value)
        except (KeyError, OverflowError, TypeError, ValueError):
            conflicts.append(_unreadable(name, value, source))
    if conflicts:
        raise PlanError(conflicts)
    return parsed


def _unreadable(name: str, value: object, source: str) -> Conflict:
    key = as_given(name, source)
    if name in SETTINGS:
        return Conflict(key, value, "the value cannot be read", f"give {SETTINGS[name].wanted}")
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    if source == ENVIRONMENT:
        near = [as_given(known, source) for known in near]
    hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(SETTINGS)}"
    return Conflict(key, value, "fp16_patch has no such setting", hint)


def _refuse_problems(values: Mapping[str, Any], source: str) -> None:
    conflicts = [Conflict(as_given(name, source), values[name], why, fix) for name, why, fix in problems_of(values)]
    if conflicts:
        raise PlanError(conflicts)
