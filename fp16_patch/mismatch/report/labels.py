"""What a run is called where it is shown beside others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fp16_patch.mismatch.record.reading import RECORD_FOLDER

UNTELLING = frozenset({RECORD_FOLDER, "checkpoints", "ckpts", "ckpt"})
"""Folders that are called the same in every run: what tells runs apart is the folder above."""


def labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Return each path under the run's name, in their order.

    The name is the folder's; of `checkpoints/fp16_patch` and the like, the folder's above, which is the experiment's.
    Where names repeat, the name is the path from where the paths part.
    """
    # Not Path.resolve, which raises for a link that leads to itself.
    runs = [_run_folder(Path(os.path.realpath(path))) for path in paths]
    names = [run.name for run in runs]
    common = os.path.commonpath([run.parent for run in runs])
    return {
        os.path.relpath(run, common) if names.count(name) > 1 else name: path
        for name, run, path in zip(names, runs, paths, strict=True)
    }


def _run_folder(path: Path) -> Path:
    return _run_folder(path.parent) if path.name in UNTELLING and path.parent.name else path
