"""Programs that the tests run on gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.cpu.warm.servers import WarmServers

TIMEOUT_S = 600
Facts = dict[str, Any]

RANKS = (pytest.param(1, id="one-rank", marks=pytest.mark.matrix), pytest.param(2, id="two-ranks"))
"""Of learners, as parameters. Runs of a framework show one rank, too; by itself it is tested by `make matrix`."""


@dataclass(frozen=True)
class Ranks:
    """Runs programs on ranks that start warm."""

    servers: WarmServers

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
        server = self.servers.server(preload, environment)
        launch = [sys.executable, "-m", "integration.cpu.warm.ranks", str(server.interpreter), str(ranks)]
        with (out / "log.txt").open("w") as log:
            ended = subprocess.run(
                [*prefix, *launch, str(program), *arguments],
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                check=False,
            )
        assert ended.returncode == 0, (out / "log.txt").read_text()[-3000:]
        facts: Facts = json.loads((out / "facts.json").read_text())
        return facts
