"""Takes from the result of `fp16-patch probe` what a plan needs: a starting scale, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fp16_patch.plan import stored_config
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.settings import SETTINGS
from fp16_patch.untrusted.paths import from_home, is_file, reason_of
from fp16_patch.untrusted.reading import Unreadable, read_bytes, read_json
from fp16_patch.untrusted.text import quoted

VERSION = 1
RUN_ANYWAY = "use FP16_PATCH=bf16, or leave FP16_PATCH_PROBE out to run in fp16 all the same"
FP16, FP16_WITH_FP32_MODULES, BF16 = "fp16", "fp16_with_fp32_modules", "bf16"
"""What a probe may recommend."""

MAX_BYTES = 16 * 2**20
"""Of a result, which has a row for each module of a model."""
_WRITTEN_BY = "give what `fp16-patch probe MODEL --json FILE` wrote"


class _Field(NamedTuple):
    """What is read of a result.

    Attributes:
        name: with a dot between a section and a name in it.
        wanted: what it has to be, after "is not".
        good: whether a value is that.
    """

    name: str
    wanted: str
    good: Callable[[Any], bool]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_FIELDS = (
    _Field("version", "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    _Field("version", f"{VERSION}, the one of this release: probe again", lambda value: bool(value == VERSION)),
    _Field("model", "an object", lambda value: isinstance(value, dict)),
    _Field("model.path", "a text", lambda value: isinstance(value, str)),
    _Field("model.config_digest", "a text", lambda value: isinstance(value, str)),
    _Field("recommendation", "an object", lambda value: isinstance(value, dict)),
    _Field(
        "recommendation.precision",
        f"one of {FP16}, {FP16_WITH_FP32_MODULES}, {BF16}",
        lambda value: isinstance(value, str) and value in (FP16, FP16_WITH_FP32_MODULES, BF16),
    ),
    _Field("recommendation.reasons", "a list of texts", _are_texts),
    _Field("recommendation.fp32_modules", "a list of texts", _are_texts),
    _Field(
        "recommendation.init_scale",
        SETTINGS["init_scale"].values,
        lambda value: SETTINGS["init_scale"].problem(value) is None,
    ),
)
"""In this order: a section before what is in it."""


def settings_of(path: str, key: str) -> dict[str, Any]:
    """Return the settings of a plan in fp16 that follow from the probe written to `path`.

    Args:
        key: the setting that names the path, as it was given, for the message of an error.

    Raises:
        PlanError: there is no such result, or it says that the model does not bear fp16.
    """
    advice = _read(path, key)["recommendation"]
    if advice["precision"] == BF16:
        reason = f"the probe found the model unsafe in fp16: {'; '.join(advice['reasons'])}"
        raise PlanError([Conflict(key, path, reason, RUN_ANYWAY)])
    if advice["precision"] != FP16:
        modules = ", ".join(advice["fp32_modules"])
        reason = f"{modules} would have to stay in FP32 in learner and sampler, which fp16_patch cannot do in vLLM"
        raise PlanError([Conflict(key, path, reason, RUN_ANYWAY)])
    return {"init_scale": float(advice["init_scale"]), "first_scale": "fixed"}


def conflict_with(path: str | None, key: str, model: object) -> Conflict | None:
    """Return a conflict if a run trains another model than was probed; None too if one of them is not here to see.

    Raises:
        PlanError: what lies at `path` is not the result of a probe.
    """
    folder = from_home(str(model))
    if path is None or not is_file(path) or not is_file(folder / stored_config.CONFIG):
        return None
    probed = _read(path, "FP16_PATCH_PROBE")["model"]
    try:
        digest = config_digest(folder)
    except (OSError, Unreadable):
        return None  # the framework says what is wrong with it
    if probed["config_digest"] == digest:
        return None
    return Conflict(key, model, f"{path} is the probe of another model, {quoted(probed['path'])}", f"probe {model}")


def config_digest(model: Path) -> str:
    """Hash a model's `config.json`: training changes its weights, not its shape.

    Raises:
        OSError: it cannot be read.
        Unreadable: it is no regular file, or too large to be one.
    """
    import hashlib

    return hashlib.sha256(read_bytes(model / stored_config.CONFIG, stored_config.MAX_BYTES)).hexdigest()[:16]


def _read(path: str, key: str) -> dict[str, Any]:
    try:
        result = read_json(Path(path), MAX_BYTES)
    except (OSError, Unreadable) as problem:
        raise _no_result(path, key, reason_of(problem)) from problem
    if not isinstance(result, dict):
        raise _no_result(path, key, "it is not an object")
    for field in _FIELDS:
        value = _value(result, field.name)
        if not field.good(value):
            raise _no_result(path, key, f"{field.name} is {quoted(value)}, not {field.wanted}")
    return result


def _value(result: dict[str, Any], name: str) -> Any:
    """Return what a field holds; of one that is not there, a word for that, which no field may hold."""
    section, _, inner = name.rpartition(".")
    return (result[section] if section else result).get(inner, _ABSENT)


class _Absent:
    def __str__(self) -> str:
        return "missing"


_ABSENT = _Absent()


def _no_result(path: str, key: str, why: str) -> PlanError:
    return PlanError([Conflict(key, path, f"not the result of a probe: {why}", _WRITTEN_BY)])
