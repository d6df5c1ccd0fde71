"""Activation in a process that was asked by its environment: imported by the entry points, or by name.

The entry points are looked up in `fp16_patch/__init__.py`, which comes here only where `FP16_PATCH` asks for it.
"""

from __future__ import annotations

from fp16_patch import wanted


def load() -> None:
    """Activate the plan the environment names, or do nothing when it names none."""
    if wanted():
        from fp16_patch.runtime.activation import activate

        activate()


def load_in_vllm() -> None:
    """As `load`, in a process vLLM started: its attestation goes to the process that started it."""
    if wanted():
        load()
        from fp16_patch.vllm import attest_this_process

        attest_this_process()


# verl imports an entry point without calling it; vLLM calls what it names. Activation happens once either way.
load()
