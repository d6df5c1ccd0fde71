"""The dtypes that a plan can decide, and how torch, frameworks and people spell them."""

from __future__ import annotations

from typing import NamedTuple


class Spelling(NamedTuple):
    """One dtype's names: torch's, the short one of modes and flags, and the tensor's method that casts to it."""

    torch: str
    short: str
    method: str

    @property
    def all(self) -> tuple[str, ...]:
        """Every name, each once."""
        return tuple(dict.fromkeys(self))


FLOAT16 = Spelling("float16", "fp16", "half")
BFLOAT16 = Spelling("bfloat16", "bf16", "bfloat16")
FLOAT32 = Spelling("float32", "fp32", "float")
DTYPES = (FLOAT16, BFLOAT16, FLOAT32)

STAYS_FP32 = ("master", "gradient", "log_prob", "entropy", "rope", "gemm_sum")
"""Quantities of the ledger that are float32 under every plan."""
# Casting fp32 masters in the sampler rounds once, as sending them in the compute dtype does.
COMPUTE_OR_FP32 = ("wire", "engine_weight", "module_output", "value")
"""Those that may be in the plan's dtype or in float32. Every other one is in the plan's dtype."""
_OF_ANY_NAME = {name: spelling for spelling in DTYPES for name in spelling}


def spelling_of(dtype: object) -> Spelling:
    """Return all names of a dtype, given one of them or torch's object.

    Raises:
        ValueError: a plan cannot decide it.
    """
    try:
        return _OF_ANY_NAME[_bare(dtype)]
    except KeyError:
        raise ValueError(f"{dtype} is none of the dtypes that a plan decides") from None


def torch_name(dtype: object) -> str:
    """Return torch's name of a dtype, without `torch.`; of what a plan cannot decide, the name as it is."""
    name = _bare(dtype)
    return _OF_ANY_NAME[name].torch if name in _OF_ANY_NAME else name


def is_half(dtype: object) -> bool:
    """Return whether it is one of the two dtypes of 16 bits."""
    return torch_name(dtype) in (FLOAT16.torch, BFLOAT16.torch)


def _bare(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
