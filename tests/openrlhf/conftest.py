"""OpenRLHF in this process, on a CPU; nothing where it is not installed, as in verl's environment."""

from __future__ import annotations

import os
from importlib.util import find_spec

from integration.cpu import launch_openrlhf

if find_spec("openrlhf") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import openrlhf_on_cpu  # noqa: F401

    os.environ.update({name: value for name, value in launch_openrlhf.ENVIRONMENT.items() if name.startswith("DS_")})
