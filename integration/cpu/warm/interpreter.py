"""Stands for `python`: has a warm server fork the process, waits for its end, and ends alike.

    python -IS interpreter.py SOCKET ARGUMENTS_OF_PYTHON…

Whatever the server declines is run by the interpreter itself, as are all command lines that it does not know. The
process has everything of this one but its pid and its session. It ends when this one does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main() -> None:
    path, *arguments = sys.argv[1:]
    descriptors = [number for number in _open() if os.get_inheritable(number)]
    request = {
        "arguments": arguments,
        "directory": os.getcwd(),  # noqa: PTH109, pathlib takes longer to import than all the rest here
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    try:
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)
        socket.send_fds(server, [b" "], descriptors)
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        accepted = answers.readline() == "warm\n"
    except OSError:
        accepted = False
    if not accepted:
        os.execv(sys.executable, [sys.executable, *arguments])
    # Whoever reads the other ends waits for the process, not for this one.
    for number in descriptors:
        os.close(number)
    status = int(answers.readline() or 1)
    if status < 0:
        os.kill(os.getpid(), signal.Signals(-status))
    os._exit(status)


def _open() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        number = int(name)
        try:
            os.fstat(number)
        except OSError:
            continue  # the list's own
        found.append(number)
    return found


main()
