"""Find what can be run of `integration`, and start each in its smallest form."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import click
import pytest

from integration.bench.command import OUT

MAIN = 'if __name__ == "__main__":'


def runnable(package: ModuleType) -> list[str]:
    """List the package's modules that `python -m` runs, by name."""
    (folder,) = map(Path, package.__path__)
    return sorted(path.stem for path in folder.glob("*.py") if MAIN in path.read_text(encoding="utf-8"))


def smoke(module: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Start a module with `--smoke`; returns what it prints. No figure that is kept may change."""
    before = _figures()
    main = import_module(module).__dict__.get("main") or import_module(module).BENCH.main
    try:
        if isinstance(main, click.Command):
            main(["--smoke"], standalone_mode=False)
        elif main.__name__ == "main" and hasattr(main, "__self__"):
            main("", ["--smoke"])
        else:
            main(["--smoke"])
    except SystemExit as ended:
        assert ended.code in (0, None), f"{module} --smoke: {ended.code}\n{capsys.readouterr()}"
    assert _figures() == before, f"{module} --smoke wrote into {OUT}"
    return capsys.readouterr().out


def _figures() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in OUT.rglob("*") if path.is_file()}
