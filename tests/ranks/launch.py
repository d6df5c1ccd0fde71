"""`torch.distributed.run` as far as tests need it, with ranks that a running server forks.

    python -m tests.ranks.launch SOCKET RANKS PROGRAM ARGUMENTS…

The ranks have this process's environment, working directory and standard output, and end when it ends. Its exit status
is 0, or that of the first rank that failed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def main() -> None:
    path, ranks, program, *arguments = sys.argv[1:]
    request = {
        "program": program,
        "arguments": arguments,
        "ranks": int(ranks),
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b" "], [sys.stdout.fileno()])
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = connection.makefile().readline()
    sys.exit(int(answer) if answer else "the rank server is gone")


if __name__ == "__main__":
    main()
