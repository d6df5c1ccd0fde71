"""Activates the plan that the environment of this process names. Imported by the entry points, or by name.

The entry points are looked up in `fp16_patch/__init__.py`, which comes here only where the environment asks for it.
"""

from __future__ import annotations

from fp16_patch import concerned


def load() -> None:
    """Activate the plan that the environment names; do nothing if it names none."""
    if concerned():
        from fp16_patch.runtime.activation import activate

        activate()


def load_in_vllm() -> None:
    """Do as `load` in a process that vLLM started, and send its attestation to the process that started it."""
    if concerned():
        load()
        from fp16_patch.vllm import attest_this_process

        attest_this_process()


def load_in_sglang() -> None:
    """Do as `load` in a process that SGLang started, and watch the model that it is to hold."""
    if concerned():
        load()
        from fp16_patch.sglang import watch_this_process

        watch_this_process()


# verl imports an entry point without calling it; samplers call what it names. Activation happens once either way.
load()
