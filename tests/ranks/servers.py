"""The rank servers of a test session, and programs that are run on their ranks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
Facts = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A running `tests.ranks.server`, which listens at `path`."""

    process: subprocess.Popen[bytes]
    path: Path
    log: Path


class RankServers:
    """One server for each module that is preloaded and each search path it is looked up on; started when first asked.

    The search path decides which release of a framework is loaded.
    """

    def __init__(self) -> None:
        # Not pytest's directory: a socket's path must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._servers: dict[tuple[str, str | None], Server] = {}

    def __enter__(self) -> RankServers:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            assert server.process.stdin is not None
            server.process.stdin.close()
            server.process.wait(TIMEOUT_S)
        self._folder.cleanup()

    def facts(
        self,
        program: Path,
        arguments: Sequence[str],
        ranks: int,
        out: Path,
        environment: Mapping[str, str],
        preload: str,
        prefix: Sequence[str] = (),
    ) -> Facts:
        """Run a program that leaves `facts.json` in `out`; what all ranks print goes to `log.txt` there.

        Args:
            preload: a module that imports what the program needs, as far as it depends on no plan.
            prefix: a command that runs the one that follows it, such as `fp16-patch run --`.
        """
        server = self.server(preload, environment)
        launch = [sys.executable, "-m", "tests.ranks.launch", str(server.path), str(ranks)]
        with (out / "log.txt").open("w") as log:
            ended = subprocess.run(
                [*prefix, *launch, str(program), *arguments],
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                check=False,
            )
        assert ended.returncode == 0, (out / "log.txt").read_text()[-3000:] + server.log.read_text()[-1000:]
        facts: Facts = json.loads((out / "facts.json").read_text())
        return facts

    def server(self, preload: str, environment: Mapping[str, str]) -> Server:
        key = preload, environment.get("PYTHONPATH")
        if key not in self._servers:
            self._servers[key] = self._start(preload, environment, Path(self._folder.name, str(len(self._servers))))
        return self._servers[key]

    def _start(self, preload: str, environment: Mapping[str, str], path: Path) -> Server:
        stock = {name: value for name, value in environment.items() if not name.startswith("FP16_PATCH")}
        output = path.with_suffix(".log")
        with output.open("w") as log, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            # Whoever connects while the server imports is served afterwards.
            listener.listen()
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.server", preload, str(listener.fileno())],
                env=stock,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        return Server(process, path, output)
