"""What the `verl.plugins` and `vllm.general_plugins` entry points load: activation when `FP16_PATCH` asks for it.

Both frameworks load this in every process they start, also for users who never asked for us: with `FP16_PATCH` unset
nothing but this file is imported.
"""

from __future__ import annotations

import os


def wanted() -> bool:
    """Whether the environment names a mode other than `off`."""
    return os.environ.get("FP16_PATCH", "off").strip().lower() not in ("", "0", "off", "false")


def load() -> None:
    """Activate the plan the environment names, or do nothing when it names none."""
    if wanted():
        from fp16_patch.activation import activate

        activate()


def load_in_vllm() -> None:
    """As `load`, in a process vLLM started: its attestation goes to the process that started it."""
    if wanted():
        load()
        from fp16_patch.vllm import attest_this_process

        attest_this_process()


# verl imports an entry point without calling it; vLLM calls what it names. Activation happens once either way.
load()
