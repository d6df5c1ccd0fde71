"""`torch.distributed.run` as far as tests and benches need it, for ranks that start warm.

    python -m integration.cpu.warm.ranks INTERPRETER RANKS PROGRAM ARGUMENTS…

When a rank fails, the others end, too, and its exit status is this one's.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from integration.cpu.process import die_with_parent

# Below those that the kernel gives to outgoing connections: one that is free stays free until rank 0 listens.
PORTS = range(20000, 32000)
POLL_S = 0.05


def main() -> None:
    interpreter, count, *command = sys.argv[1:]
    ranks = [
        subprocess.Popen(
            [interpreter, "-u", *command],
            env={**os.environ, **of_rank},
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        for of_rank in environments(int(count))
    ]
    try:
        sys.exit(_followed(ranks))
    finally:
        for rank in ranks:
            rank.kill()


def environments(count: int) -> list[dict[str, str]]:
    """What torch reads of each rank of one job."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _followed(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first exit status that is not 0, once there is one, or else 0 when all have ended."""
    while True:
        ended = [rank.poll() for rank in ranks]
        for rank, status in enumerate(ended):
            if status:
                print(f"rank {rank} ended with {status}; the others are stopped", flush=True)
                return status if status > 0 else 128 - status
        if None not in ended:
            return 0
        time.sleep(POLL_S)


def _port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    main()
