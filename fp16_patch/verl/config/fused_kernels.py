"""Judges verl's fused kernels, which make log-probs of hidden states without keeping logits, by their code."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from fp16_patch.patching.fingerprint import parsed
from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.verl.config.selection import Select
from fp16_patch.verl.config.supported_engines import MEGATRON, VEOMNI

SWITCH = "actor_rollout_ref.model.use_fused_kernels"
BACKEND = "actor_rollout_ref.model.fused_kernel_options.impl_backend"
_OF_VEOMNI = (
    "VeOmni's chunked kernel adds up the head's gradient over chunks of tokens in float16, and divides logits by the "
    "temperature in it"
)
_TRITON, _TORCH = "verl.utils.kernel.kernels", "verl.utils.experimental.torch_functional"


def fused_kernel_conflict(select: Select, strategy: object, plan: Plan) -> Conflict | None:
    """Say why the run's fused kernels cannot be had under the plan; None if they can, or if there are none.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        strategy: the actor's engine. Megatron's kernels are Triton's, VeOmni's its own, whatever `impl_backend` says.
    """
    if not select(SWITCH) or not plan.scales_loss:
        return None
    if strategy == VEOMNI:
        return Conflict(SWITCH, True, _OF_VEOMNI, "set it to false")
    backend = "triton" if strategy == MEGATRON else str(select(BACKEND))
    sources = Installed()
    if backend == "triton" and scales_in_fp32(sources):
        return None
    return Conflict(SWITCH, True, _REASONS.get(backend, _unknown)(backend, sources), _fix(backend, sources))


def scales_in_fp32(sources: Sources) -> bool:
    """Return whether the Triton kernels divide FP32 logits by the temperature, and return FP32 log-probs and entropy.

    Both are read in their code: the tensors that the host allocates for the results, and the accumulator that the
    kernel multiplies by one over the temperature.
    """
    source = sources.read(_TRITON) or ""
    host = parsed(source, "efficient_entropy_forward")
    kernel = parsed(source, "efficient_entropy_kernel_general_mainloop")
    if host is None or kernel is None:
        return False
    scaled = any(ast.unparse(node) == "logits *= rcp_temperature" for node in ast.walk(kernel))
    results = all(_made_in(host, name, "torch.float32") for name in ("logprobs", "entropy"))
    return scaled and results and _made_in(kernel, "logits", "tl.float32")


def rounded_by_torch(sources: Sources) -> list[str]:
    """Return which of log-probs and entropy FSDP's torch kernels round to the dtype of the hidden states."""
    function = parsed(sources.read(_TORCH) or "", "_fused_linear_for_ppo_fwd")
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)] if function else []
    results = next((value.elts for value in returned if isinstance(value, ast.Tuple)), [])
    named = zip(("log-probs", "the entropy"), results, strict=False)
    return [name for name, value in named if "orig_dtype" in ast.unparse(value)]


def _of_torch(backend: str, sources: Sources) -> str:
    rounded = " and ".join(rounded_by_torch(sources)) or "what they make"
    return f"its {backend} kernels divide logits by the temperature in float16 and return {rounded} in it"


def _of_triton(backend: str, sources: Sources) -> str:
    del sources
    return f"the {backend} kernels of this release do not divide logits, or return log-probs, in float32"


def _unknown(backend: str, sources: Sources) -> str:
    del sources
    return f"nobody has checked what its {backend} kernels compute in"


_REASONS: dict[str, Callable[[str, Sources], str]] = {"torch": _of_torch, "triton": _of_triton}


def _fix(backend: str, sources: Sources) -> str:
    other = f", or {BACKEND}=triton, which computes in float32"
    return "set it to false" + (other if backend != "triton" and scales_in_fp32(sources) else "")


def _made_in(function: ast.AST, name: str, dtype: str) -> bool:
    """Return whether a function allocates what it calls `name`, and always in this dtype."""
    module = dtype.partition(".")[0]
    made = [value for target, value in _assigned(function) if target == name and _allocates(value, module)]
    return bool(made) and all(_dtype_of(value) == dtype for value in made)


def _assigned(function: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)


def _allocates(value: ast.expr, module: str) -> bool:
    allocators = {f"{module}.{name}" for name in ("empty", "zeros", "full")}
    return isinstance(value, ast.Call) and ast.unparse(value.func) in allocators


def _dtype_of(value: ast.expr) -> str | None:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return next((ast.unparse(keyword.value) for keyword in keywords if keyword.arg == "dtype"), None)
