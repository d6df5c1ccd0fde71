"""Runs of verl for a bench start warm: what differs between its arms is not how a process came to its imports."""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path

from integration.cpu import launch, process
from integration.cpu.warm.servers import WarmServers


@cache
def warm_python() -> Path:
    """Return the executable that stands for `python` in runs of verl, until this process ends."""
    servers = WarmServers()
    atexit.register(servers.__exit__, None, None, None)
    own = {name: value for name, value in launch.ENVIRONMENT.items() if name in process.ENVIRONMENT}
    environment = process.environment(own, str(launch.MODULES))
    return servers.server("integration.cpu.warm.imports_of_runs", environment).interpreter
