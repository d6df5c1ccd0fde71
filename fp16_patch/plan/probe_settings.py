"""Takes from the result of `fp16-patch probe` what a plan needs: a starting scale, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp16_patch.plan.errors import Conflict, PlanError

VERSION = 1
RUN_ANYWAY = "use FP16_PATCH=bf16, or leave FP16_PATCH_PROBE out to run in fp16 all the same"


def settings_of(path: str, key: str) -> dict[str, Any]:
    """Return the settings of a plan in fp16 that follow from the probe written to `path`.

    Args:
        key: the setting that names the path, as it was given, for the message of an error.

    Raises:
        PlanError: there is no such result, or it says that the model does not bear fp16.
    """
    advice = _read(path, key)["recommendation"]
    if advice["precision"] == "bf16":
        reason = f"the probe found the model unsafe in fp16: {'; '.join(advice['reasons'])}"
        raise PlanError([Conflict(key, path, reason, RUN_ANYWAY)])
    if advice["precision"] != "fp16":
        modules = ", ".join(advice["fp32_modules"])
        reason = f"{modules} would have to stay in FP32 in learner and sampler, which fp16_patch cannot do in vLLM"
        raise PlanError([Conflict(key, path, reason, RUN_ANYWAY)])
    return {"init_scale": float(advice["init_scale"]), "first_scale": "fixed"}


def conflict_with(path: str | None, key: str, model: object) -> Conflict | None:
    """Return a conflict if a run trains another model than was probed; None too if one of them is not here to see."""
    if (
        path is None
        or not Path(path).is_file()
        or not (config := Path(str(model)).expanduser() / "config.json").is_file()
    ):
        return None
    probed = _read(path, "FP16_PATCH_PROBE")["model"]
    if probed["config_digest"] == config_digest(config.parent):
        return None
    return Conflict(key, model, f"{path} is the probe of another model, {probed['path']}", f"probe {model}")


def config_digest(model: Path) -> str:
    """Hash a model's `config.json`: training changes its weights, not its shape."""
    import hashlib

    return hashlib.sha256((model / "config.json").read_bytes()).hexdigest()[:16]


def _read(path: str, key: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        known = result["version"] == VERSION
    except (OSError, ValueError, KeyError, TypeError) as problem:
        fix = "give what `fp16-patch probe MODEL --json FILE` wrote"
        raise PlanError([Conflict(key, path, f"not the result of a probe: {problem}", fix)]) from problem
    if not known:
        fix = "probe again with this release"
        raise PlanError([Conflict(key, path, f"written in version {result['version']}, not {VERSION}", fix)])
    read: dict[str, Any] = result
    return read
