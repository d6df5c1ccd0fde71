"""What to probe: the command's options, checked before anything is loaded.

torch is asked for the device, and only once all else is right: whoever mistypes a path is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fp16_patch.plan.dtypes import DTYPES
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.stored_config import CONFIG, MAX_BYTES
from fp16_patch.untrusted.paths import is_file, reason_of
from fp16_patch.untrusted.reading import Unreadable, read_json

AUTO = "auto"
MOST_RESPONSES = 100_000
MOST_TOKENS = 1_000_000
TEMPERATURES = (0.01, 100.0)
"""vLLM takes what is below for a choice of the likeliest token."""
LAST_SEED = 2**32 - 1
"""NumPy's, which vLLM seeds as well."""
_KNOWN = tuple(dtype.short for dtype in DTYPES)


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe.

    Attributes:
        model: a directory with a causal language model in Hugging Face's layout.
        prompts: a file, see `read_prompts`; a few built-in ones if None.
        count: responses that are sampled in each of the sampler's dtypes.
        sampler: `vllm`, `hf`, or `auto`: vLLM where it is installed.
        dtypes: those that sampler and learner are compared in, some of `fp32`, `fp16`, `bf16`.
        device: the learner's, and the sampler's if that is not vLLM; `auto`: CUDA where there is one, else the CPU.

    Raises:
        PlanError: a value that cannot be used.
    """

    model: Path
    prompts: Path | None = None
    count: int = 32
    max_new_tokens: int = 256
    temperature: float = 1.0
    sampler: str = AUTO
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    device: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        conflicts = [*self._conflicts()]
        if conflicts:
            raise PlanError(conflicts)
        if self.device == AUTO:
            object.__setattr__(self, "device", _device_here())
        elif (conflict := _device_conflict(self.device)) is not None:
            raise PlanError([conflict])

    def _conflicts(self) -> Iterator[Conflict]:
        yield from _model_conflicts(self.model)
        unknown = [dtype for dtype in self.dtypes if dtype not in _KNOWN]
        if unknown or not self.dtypes:
            yield Conflict("--mode", unknown or "", "no such dtype" if unknown else "none", "use fp32, fp16, bf16")
        for option, (value, least, most, reason) in self._numbers().items():
            if not least <= value <= most:
                yield Conflict(option, value, reason, f"use a number from {least:g} to {most}")
        if self.sampler == "vllm" and not _has_vllm():
            yield Conflict("--sampler", self.sampler, "vLLM is not installed here", "use hf")

    def _numbers(self) -> dict[str, tuple[float, float, float, str]]:
        """Return of each number that is asked for: option → value, least, most, what is wrong with any other."""
        return {
            "--count": (self.count, 1, MOST_RESPONSES, "no number of responses that can be held"),
            "--max-new-tokens": (self.max_new_tokens, 1, MOST_TOKENS, "no length of a response"),
            "--temperature": (self.temperature, *TEMPERATURES, "no sampling"),
            "--seed": (self.seed, 0, LAST_SEED, "no seed that every library takes"),
        }

    @property
    def uses_vllm(self) -> bool:
        return self.sampler == "vllm" or (self.sampler == AUTO and _has_vllm())


def _has_vllm() -> bool:
    return find_spec("vllm") is not None


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _model_conflicts(model: Path) -> Iterator[Conflict]:
    """Yield why a folder holds no model, as far as its configuration tells."""
    file = model / CONFIG
    if not is_file(file):
        fix = "give the folder of a model on this machine; names of the Hugging Face hub are not looked up"
        yield Conflict("MODEL", model, f"no {CONFIG} there", fix)
        return
    try:
        why = None if isinstance(read_json(file, MAX_BYTES), dict) else "it is not an object"
    except (OSError, Unreadable) as problem:
        why = reason_of(problem)
    if why is not None:
        yield Conflict(
            "MODEL", model, f"its {CONFIG} is no configuration: {why}", "mend it, or download the model again"
        )


def _device_conflict(device: str) -> Conflict | None:
    """Return why nothing can be computed on a device; None if it can."""
    import torch

    try:
        torch.ones(1, device=device).item()
    except Exception as problem:  # each kind of device has its own
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        return Conflict(
            "--device", device, f"torch cannot compute there: {said}", "use cpu, or cuda where there is one"
        )
    return None
