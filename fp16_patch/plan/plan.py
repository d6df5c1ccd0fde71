"""The precision decision of a run: made once in the driver, carried unchanged to every process."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fp16_patch.plan import probe_settings
from fp16_patch.plan.errors import Conflict, PlanError

if TYPE_CHECKING:
    import torch

MODE_ENV = "FP16_PATCH"
PLAN_ENV = "FP16_PATCH_PLAN"
SPOOL_ENV = "FP16_PATCH_SPOOL"
ROLE_ENV = "FP16_PATCH_ROLE"
KIND_ENV = "FP16_PATCH_KIND"
DRIVER_ENV = "FP16_PATCH_DRIVER"
# Between processes of one run; every other variable with our name in front is a setting.
OWN_VARIABLES = frozenset({PLAN_ENV, SPOOL_ENV, ROLE_ENV, KIND_ENV, DRIVER_ENV})
_ENVIRONMENT = "environment"

_DTYPE_OF_MODE = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "observe": None, "off": None}
_FIRST_SCALE = 65536.0
_MODE_ALIASES = {"1": "fp16", "true": "fp16", "on": "fp16", "0": "off", "false": "off", "": "off"}


@dataclass(frozen=True)
class Plan:
    """What every process computes in, how losses are scaled, and how strict we are.

    Attributes:
        mode: `fp16`, or the other arms of a comparison `bf16` and `fp32`; `observe` measures a run and changes
            nothing; `off` does nothing at all.
        init_scale: first loss scale of a run (torch's and DeepSpeed's default is 2**16), where it is not measured.
        first_scale: `measured` on the first mini-batch's gradients, where the learner lets itself be measured, or
            `fixed` to `init_scale`, as it is once anybody gives one.
        growth_interval: optimizer steps without overflow before the scale doubles.
        growth_factor: what the scale is multiplied by then.
        backoff_factor: what the scale is multiplied by after an overflow.
        hysteresis: overflows before DeepSpeed's or Megatron's scaler lowers the scale; torch's lowers it at the first.
        min_scale: floor of the scale; an overflow there is a collapse, once a step was taken only of an update that
            began there.
        on_overflow: `retry` computes the same mini-batch again at the lowered scale, `skip` drops it.
        max_retries: this many times for one optimizer step; then it is skipped.
        scale_rule: `ahead` lets the scale grow after `growth_interval` steps only where the gradients that were looked
            at in them would bear it, `torch` does so blindly. Of verl's FSDP engine; elsewhere it always grows.
        gradient_look_every: optimizer steps between looks at the FP16 gradients, how large and how many of them
            underflow; 0 for none but those that `ahead` needs. Of verl's FSDP engine.
        max_consecutive_skips: this many skipped steps in a row are a collapse.
        fused_step: put Adam and AdamW of verl's FSDP engine on torch's fused kernel, unless the configuration names
            one. A step of that kernel, whoever chose it, unscales and clips in it; others in passes of their own.
        strict: refuse framework code we do not know. When false that is one warning and the ledger still decides.
        ledger_every: the driver reads every process's ledger before the first two updates, then each so many steps.
        probe: the result of `fp16-patch probe`; in fp16 its starting scale is taken, and an unsafe model refused.
        out_dir: where the monitor writes; the framework's own output directory when None.
        monitor: measure the mismatch of sampler and learner.
        monitor_timeout_s: the longest a step waits for its own figures; without them it goes on.
        noise_floor_every: steps between measurements of the learner against itself; 0 for none.
        noise_floor_share: share of the sequences scored once more for it.
        on_alert: `log`, or `stop` to end the run when an alert fires.
        alert_k1: alert where |k1| is above; as for each alert, 0 disables it.
        alert_ess: alert where the effective sample size, a share of the tokens, is below.
        alert_chi2: alert where the chi-square divergence of the tokens' ratios is above.
        alert_token_mult_prob_error: alert where mean exp|d| is above.
        alert_prob_diff: alert where some token's probabilities differ by more.
        alert_doubling_steps: alert where mean |d| has doubled over so many steps.
        alert_after: consecutive steps beyond a threshold before an alert fires, and within it before it clears.

    Raises:
        PlanError: a value is of the wrong kind or out of range; the message names setting, value and fix.
    """

    mode: str = "fp16"
    init_scale: float = _FIRST_SCALE
    first_scale: str = "measured"
    growth_interval: int = 400
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    hysteresis: int = 1
    min_scale: float = 1.0
    on_overflow: str = "retry"
    max_retries: int = 8
    scale_rule: str = "ahead"
    gradient_look_every: int = 25
    max_consecutive_skips: int = 20
    fused_step: bool = True
    strict: bool = True
    ledger_every: int = 50
    probe: str | None = None
    out_dir: str | None = None
    monitor: bool = True
    monitor_timeout_s: float = 2.0
    noise_floor_every: int = 10
    noise_floor_share: float = 0.03
    on_alert: str = "log"
    alert_k1: float = 0.1
    alert_ess: float = 0.3
    alert_chi2: float = 1.0
    alert_token_mult_prob_error: float = 1.05
    alert_prob_diff: float = 0.95
    alert_doubling_steps: int = 100
    alert_after: int = 2

    def __post_init__(self) -> None:
        if self.init_scale != _FIRST_SCALE and self.first_scale == "measured":
            object.__setattr__(self, "first_scale", "fixed")
        conflicts = [conflict for check in _CHECKS if (conflict := check(self)) is not None]
        if conflicts:
            raise PlanError(conflicts)

    @property
    def active(self) -> bool:
        return self.mode != "off"

    @property
    def overrides_dtype(self) -> bool:
        """Whether the plan decides the dtype, rather than only watching."""
        return _DTYPE_OF_MODE[self.mode] is not None

    @property
    def dtype(self) -> str | None:
        """Torch's name of the compute dtype (`float16`, …); None when the plan leaves it to the framework."""
        return _DTYPE_OF_MODE[self.mode]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype. Only plans that change something have one."""
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
        # Complete as it is: what it was made of, a probe's result for one, need not be on this machine.
        return cls(**_parsed(json.loads(text), PLAN_ENV))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str, base: Plan | None = None) -> Plan:
        """A plan from a mapping of field name → value, over the defaults or over `base`.

        Args:
            settings: values may be strings, as hydra and the environment give them.
            source: where the settings come from, for the message of an error.

        Raises:
            PlanError: an unknown setting, a value that does not parse, or a probe that speaks against the plan.
        """
        parsed = _parsed(settings, source)
        if "init_scale" in parsed:
            parsed["first_scale"] = "fixed"  # also where it is the default's value that is asked for
        plan = replace(base or cls(), **parsed)
        applied_before = base is not None and base.scales_loss and "probe" not in parsed
        if plan.probe is None or not plan.scales_loss or applied_before:
            return plan
        measured = probe_settings.settings_of(plan.probe)
        return replace(plan, **{name: value for name, value in measured.items() if name not in parsed})

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, default_mode: str = "off") -> Plan:
        """The plan a parent process carried here, else the one `FP16_PATCH` and `FP16_PATCH_<SETTING>` describe.

        Raises:
            PlanError: as `from_settings` does; also for a variable that would be a setting if there were one.
        """
        if PLAN_ENV in environ:
            return cls.from_json(environ[PLAN_ENV])
        settings = _from_variables(environ)
        return cls.from_settings({**settings, "mode": environ.get(MODE_ENV, default_mode)}, source=_ENVIRONMENT)


_ALERT_THRESHOLDS = (
    "alert_k1",
    "alert_ess",
    "alert_chi2",
    "alert_token_mult_prob_error",
    "alert_prob_diff",
    "alert_doubling_steps",
)
_FIELD_TYPES: dict[str, str] = {field.name: str(field.type) for field in fields(Plan)}


def _from_variables(environ: Mapping[str, str]) -> dict[str, str]:
    prefix = f"{MODE_ENV}_"
    names = [name for name in environ if name.startswith(prefix) and name not in OWN_VARIABLES]
    settings = {name.removeprefix(prefix).lower(): environ[name] for name in names}
    if "mode" in settings:
        conflict = Conflict(f"{prefix}MODE", settings["mode"], "fp16_patch has no such setting", f"set {MODE_ENV}")
        raise PlanError([conflict])
    return settings


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    return words[str(value).strip().lower()]


def _parse_int(value: Any) -> int:
    if float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value))


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "str": lambda value: str(value).strip().lower(),
    "str | None": lambda value: None if value is None else str(value),
    "float": float,
    "int": _parse_int,
    "bool": _parse_bool,
}

_WANTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a word",
    "str | None": "a path",
}


def _parsed(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    parsed, conflicts = {}, []
    for name, value in settings.items():
        try:
            parsed[name] = _parse(name, value)
        except (KeyError, OverflowError, TypeError, ValueError):
            conflicts.append(_bad_setting(name, value, source))
    if conflicts:
        raise PlanError(conflicts)
    return parsed


def _parse(name: str, value: Any) -> Any:
    parsed = _PARSERS[_FIELD_TYPES[name]](value)
    return _MODE_ALIASES.get(parsed, parsed) if name == "mode" else parsed


def _bad_setting(name: str, value: object, source: str) -> Conflict:
    key = _as_given(name, source)
    if name in _FIELD_TYPES:
        return Conflict(key, value, "the value cannot be read", f"give {_WANTED[_FIELD_TYPES[name]]}")
    near = difflib.get_close_matches(name, _FIELD_TYPES, n=1)
    if source == _ENVIRONMENT:
        near = [_as_given(known, source) for known in near]
    hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(_FIELD_TYPES)}"
    return Conflict(key, value, "fp16_patch has no such setting", hint)


def _as_given(name: str, source: str) -> str:
    """How the user spells a setting there."""
    if source == _ENVIRONMENT:
        return MODE_ENV if name == "mode" else f"{MODE_ENV}_{name.upper()}"
    return f"{source}.{name}"


def _check_mode(plan: Plan) -> Conflict | None:
    if plan.mode in _DTYPE_OF_MODE:
        return None
    return Conflict("fp16_patch.mode", plan.mode, "no such mode", f"use one of {', '.join(_DTYPE_OF_MODE)} (1 = fp16)")


def _choice_check(name: str, *choices: str, what: str) -> Callable[[Plan], Conflict | None]:
    def check(plan: Plan) -> Conflict | None:
        value = getattr(plan, name)
        if value in choices:
            return None
        return Conflict(f"fp16_patch.{name}", value, f"no such {what}", f"use {' or '.join(choices)}")

    return check


def _range_check(name: str, good: Callable[[Any], bool], wanted: str) -> Callable[[Plan], Conflict | None]:
    def check(plan: Plan) -> Conflict | None:
        value = getattr(plan, name)
        if good(value):
            return None
        return Conflict(f"fp16_patch.{name}", value, "out of range", f"use {wanted}")

    return check


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _check_floor(plan: Plan) -> Conflict | None:
    if not (_positive(plan.init_scale) and _positive(plan.min_scale)) or plan.min_scale <= plan.init_scale:
        return None
    return Conflict(
        "fp16_patch.min_scale", plan.min_scale, "above init_scale", f"use at most init_scale={plan.init_scale}"
    )


_CHECKS: tuple[Callable[[Plan], Conflict | None], ...] = (
    _check_mode,
    _range_check("init_scale", _positive, "a finite scale above 0, 65536 by default"),
    _range_check("min_scale", _positive, "a finite scale above 0, 1 by default"),
    _range_check("growth_interval", lambda value: value >= 1, "at least 1 step, 400 by default"),
    _range_check("growth_factor", lambda value: math.isfinite(value) and value > 1, "a factor above 1"),
    _range_check("backoff_factor", lambda value: 0 < value < 1, "a factor between 0 and 1"),
    _range_check("hysteresis", lambda value: value >= 1, "at least 1 overflow, 1 by default"),
    _choice_check("first_scale", "measured", "fixed", what="start"),
    _choice_check("on_overflow", "retry", "skip", what="action"),
    _range_check("max_retries", lambda value: value >= 0, "a number of retries, 8 by default, 0 for none"),
    _choice_check("scale_rule", "torch", "ahead", what="rule"),
    _range_check("gradient_look_every", lambda value: value >= 0, "a number of steps, 25 by default, 0 for never"),
    _range_check("max_consecutive_skips", lambda value: value >= 1, "at least 1 step, 20 by default"),
    _range_check("ledger_every", lambda value: value >= 1, "at least 1 step, 50 by default"),
    _check_floor,
    _range_check("monitor_timeout_s", _positive, "a finite number of seconds above 0, 2 by default"),
    _range_check("noise_floor_every", lambda value: value >= 0, "a number of steps, 10 by default, 0 for never"),
    _range_check("noise_floor_share", lambda value: 0 < value <= 1, "a share of the sequences, above 0 and at most 1"),
    _choice_check("on_alert", "log", "stop", what="action"),
    *(_range_check(name, _not_negative, "a threshold of 0 (no such alert) or above") for name in _ALERT_THRESHOLDS),
    _range_check("alert_after", lambda value: value >= 1, "at least 1 step, 2 by default"),
)
