"""Warm servers, started when first asked for, and gone with whoever asked."""

from __future__ import annotations

import atexit
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[3]
END_S = 60.0
# What frameworks and vLLM are built on.
IMPORTS = "integration.cpu.warm.imports"


@dataclass(frozen=True)
class Server:
    """A running `integration.cpu.warm.server`.

    Attributes:
        interpreter: the executable that stands for `python`.
        log: what it and its processes say outside of their own output.
    """

    process: subprocess.Popen[bytes]
    interpreter: Path
    log: Path


class WarmServers:
    """One server for each module that is preloaded and each search path it is looked up on.

    The search path decides which release of a framework is loaded.
    """

    def __init__(self) -> None:
        # A socket's path must be short, and an interpreter's without spaces.
        self._folder = tempfile.TemporaryDirectory(prefix="warm-", dir="/tmp")
        self._servers: dict[tuple[str, str | None], Server] = {}

    def __enter__(self) -> WarmServers:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the servers, and with them their processes."""
        for server in self._servers.values():
            assert server.process.stdin is not None
            server.process.stdin.close()
            server.process.wait(END_S)
        self._folder.cleanup()

    def server(self, preload: str, environment: Mapping[str, str]) -> Server:
        """One whose processes have imported `preload`: in this environment, but without a plan."""
        key = preload, environment.get("PYTHONPATH")
        if key not in self._servers:
            folder = Path(self._folder.name, str(len(self._servers)))
            folder.mkdir()
            self._servers[key] = _start(preload, environment, folder)
        return self._servers[key]


@cache
def of_this_process() -> WarmServers:
    """Warm servers for all of this process, and gone with it."""
    servers = WarmServers()
    atexit.register(servers.close)
    return servers


def _start(preload: str, environment: Mapping[str, str], folder: Path) -> Server:
    stock = {name: value for name, value in environment.items() if not name.startswith("FP16_PATCH")}
    path, interpreter, log = folder / "socket", folder / "python", folder / "log.txt"
    asking = [sys.executable, "-IS", str(Path(__file__).with_name("interpreter.py")), str(path)]
    interpreter.write_text(f'#!/bin/sh\nexec {shlex.join(asking)} "$@"\n')
    interpreter.chmod(0o755)
    with log.open("w") as output, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        # Whoever connects while the server imports is served afterwards.
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "integration.cpu.warm.server", preload, str(interpreter), str(listener.fileno())],
            env={**stock, "PYTHONPATH": os.pathsep.join(filter(None, [stock.get("PYTHONPATH"), str(ROOT)]))},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    return Server(process, interpreter, log)
