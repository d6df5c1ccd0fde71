"""What to probe: the command's options, checked before anything is loaded.

torch is asked for the device, and only once all else is right: whoever mistypes a path is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fp16_patch.plan.dtypes import DTYPES
from fp16_patch.plan.errors import Conflict, PlanError

AUTO = "auto"
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
        conflicts = [conflict for conflict in self._conflicts() if conflict is not None]
        if conflicts:
            raise PlanError(conflicts)
        if self.device == AUTO:
            object.__setattr__(self, "device", _device_here())

    def _conflicts(self) -> list[Conflict | None]:
        unknown = [dtype for dtype in self.dtypes if dtype not in _KNOWN]
        has_config = (self.model / "config.json").is_file()
        fix = "give the folder of a model on this machine; names of the Hugging Face hub are not looked up"
        return [
            None if has_config else Conflict("MODEL", self.model, "no config.json there", fix),
            Conflict("--mode", unknown, "no such dtype", "use fp32, fp16, bf16") if unknown else None,
            None if self.dtypes else Conflict("--mode", "", "none", "use fp32, fp16, bf16"),
            None if self.count > 0 else Conflict("--count", self.count, "nothing to sample", "use at least 1"),
            None
            if self.max_new_tokens > 0
            else Conflict("--max-new-tokens", self.max_new_tokens, "no response", "use at least 1"),
            None if self.temperature > 0 else Conflict("--temperature", self.temperature, "no sampling", "use 1"),
            Conflict("--sampler", self.sampler, "vLLM is not installed here", "use hf")
            if self.sampler == "vllm" and not _has_vllm()
            else None,
        ]

    @property
    def uses_vllm(self) -> bool:
        return self.sampler == "vllm" or (self.sampler == AUTO and _has_vllm())


def _has_vllm() -> bool:
    return find_spec("vllm") is not None


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
