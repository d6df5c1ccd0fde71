"""Looks up what is used of each sampler in the wheel of each release of the table, and says what is missing.

    python -m integration.matrix.samplers [VERSION …]

Of the releases that are named, or of all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fp16_patch.releases.wheels import download
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.vllm.sampler import VLLM
from integration.matrix.versions import Tested, tested_releases

_SAMPLERS: dict[str, Sampler] = {sampler.interface.package: sampler for sampler in (VLLM, SGLANG)}


def checked(releases: Sequence[Tested]) -> Iterator[tuple[Tested, list[str]]]:
    """Download each release, and yield what it lacks."""
    for release in releases:
        with TemporaryDirectory() as folder:
            wheel = download(release.distribution or release.package, release.version, Path(folder))
            yield release, _SAMPLERS[release.package].interface.lacking(wheel)


def main(versions: Sequence[str]) -> int:
    """Print a line for each release; 1 if one lacks something, or none of them is in the table."""
    of_samplers = [release for release in tested_releases() if release.package in _SAMPLERS]
    wanted = [release for release in of_samplers if not versions or release.version in versions]
    failed = not wanted
    for release, missing in checked(wanted):
        print(release, "; ".join(missing) or "has all that is used of it", flush=True)
        failed |= bool(missing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
