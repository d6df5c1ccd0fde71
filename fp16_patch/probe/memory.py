"""The memory of this process: given back to the system, and how much it was at most."""

from __future__ import annotations

import ctypes
import gc
import resource
from itertools import count

from fp16_patch.probe.progress import Advance


def giving_memory_back(advance: Advance, every: int) -> Advance:
    """Give memory back at every so many calls: a cache that grows by tokens leaves as much behind as it holds."""
    calls = count(1)

    def advanced(parts: int) -> None:
        advance(parts)
        if next(calls) % every == 0:
            give_memory_back()

    return advanced


def give_memory_back() -> None:
    """Return freed memory to the system: glibc keeps what was freed in pieces, and may not use it again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Return the peak resident memory of this process or of its largest child, whichever is larger, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(1024 * int(resource.getrusage(one).ru_maxrss) for one in who)
