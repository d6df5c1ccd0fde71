"""The model that is probed, as transformers loads it: in FP32, on the learner's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.untrusted.text import quoted

BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 27
"""A forward's logits, 512 MB of them in FP32, bound its tokens where the vocabulary is large."""


def load_config_and_tokenizer(path: Path) -> tuple[Any, Any]:
    """Read a model's configuration and its tokenizer. No code of the folder is run.

    Raises:
        PlanError: transformers does not load one of them.
    """
    return _loaded(AutoConfig, path), _loaded(AutoTokenizer, path)


def load_model(path: Path, device: str) -> nn.Module:
    """Load a causal language model in FP32 for evaluation; its parameters ask for no gradient.

    Raises:
        PlanError: transformers does not load it.
    """
    dtype = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    model: Any = _loaded(AutoModelForCausalLM, path, **{dtype: torch.float32})
    with refusing_to_overflow(device):
        loaded: nn.Module = model.to(device).requires_grad_(False).eval()
    return loaded


def _loaded(kind: Any, path: Path, **settings: Any) -> Any:
    try:
        # Without it, transformers asks at the terminal, and a yes runs code of the folder.
        return kind.from_pretrained(path, trust_remote_code=False, **settings)
    except Exception as problem:  # of a damaged folder, transformers raises whatever comes
        raise _not_loaded(path, problem) from problem


def _not_loaded(path: Path, problem: Exception) -> PlanError:
    said = " ".join(f"{problem}".split()) or "it says nothing"
    fix = "give a causal language model that transformers loads by itself"
    return PlanError([Conflict("MODEL", path, f"cannot be loaded: {type(problem).__name__}: {quoted(said)}", fix)])


@contextmanager
def refusing_to_overflow(device: str) -> Iterator[None]:
    """Say what to do where the device has no room for what is computed in this block.

    Raises:
        PlanError: its memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as full:
        reason = f"its memory is full ({str(full).splitlines()[0]})"
        raise PlanError([Conflict("--device", device, reason, "use --device cpu, or one with more memory")]) from full


@contextmanager
def by_its_parts(model: Any) -> Iterator[None]:
    """Compute attention and experts by separate operations for a while: fused kernels do not show their scores."""
    names = [name for name in ("_attn_implementation", "_experts_implementation") if hasattr(model.config, name)]
    kept = {name: getattr(model.config, name) for name in names}
    try:
        for name in names:
            setattr(model.config, name, "eager")
        yield
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


def vocabulary_of(path: Path, config: Any) -> int:
    """Return how many tokens a model knows.

    Raises:
        PlanError: its configuration does not say.
    """
    try:
        size = int(config.get_text_config().vocab_size)
    except Exception as problem:  # a damaged configuration may hold anything
        raise _not_loaded(path, problem) from problem
    if size < 1:
        raise PlanError([Conflict("MODEL", path, f"its configuration says vocab_size={size}", "mend its config.json")])
    return size


def batch_tokens(vocabulary: int) -> int:
    """Bound the tokens of a forward, so that its logits stay within ``BATCH_LOGITS`` numbers."""
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary))


def stop_ids(model: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a response: those of the model's generation settings, else of its tokenizer.

    Raises:
        PlanError: these settings are damaged.
    """
    try:
        ends = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    except Exception as problem:  # a damaged file may hold anything
        raise _not_loaded(model, problem) from problem
    ends = tokenizer.eos_token_id if ends is None else ends
    ids = () if ends is None else (ends,) if isinstance(ends, int) else ends
    if not isinstance(ids, list | tuple) or not all(isinstance(end, int) and 0 <= end < 2**63 for end in ids):
        reason = f"its generation_config.json says eos_token_id={quoted(ends)}"
        raise PlanError([Conflict("MODEL", model, reason, "give one token's id, or a list of them")])
    return frozenset(ids)
