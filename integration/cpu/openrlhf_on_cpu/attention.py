"""The attention kernels: OpenRLHF imports flash-attn wherever it runs, used or not, and flash-attn needs CUDA."""

import sys
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages")


def install() -> None:
    # At the end of the path: a real flash-attn comes first.
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
