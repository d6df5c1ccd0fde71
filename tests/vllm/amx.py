"""An extension of vLLM's worker that asks the kernel for AMX.

vLLM's attention in bfloat16 uses AMX wherever the CPU has it, and the kernel ends whoever has not asked. Torch asks
when it first multiplies large enough matrices, which those of a tiny model need not be.
"""

from __future__ import annotations

import torch

torch.cpu._init_amx()


class Extension:
    """Adds nothing: importing it in the worker is enough."""
