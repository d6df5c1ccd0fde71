"""Start a bench, a demo or a recipe from the command line: where its results go, and `--smoke`, its smallest form.

Every module of `integration/bench`, `integration/demo` and `integration/recipes` that can be run understands
`--smoke`: it walks the same code as the full run in its smallest form, in a temporary folder, and keeps nothing. A test
starts each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

OUT = Path(__file__).parent / "out"
SMOKE_HELP = "walk the same code in its smallest form, to see that it runs; keeps no figures"

Size = TypeVar("Size")


@dataclass(frozen=True)
class Bench(Generic[Size]):
    """A bench with one result, that takes a seed and a size.

    Attributes:
        name: of its result, `out/<name>.json`.
        measure: takes a folder for models and runs, a seed and a size; returns the figures, as JSON can hold them.
        show: prints the figures.
        full: the size that figures are measured at.
        smoke: the smallest size that walks the same code.
        folder: of models and runs in `out`; benches that name the same one share models. Its name by default.
    """

    name: str
    measure: Callable[[Path, int, Size], dict[str, Any]]
    show: Callable[[Any, Console], None]
    full: Size
    smoke: Size
    folder: str | None = None

    def main(self, about: str | None, argv: Sequence[str] | None = None) -> None:
        """Measure once, keep the figures and print them."""
        arguments = parser(about).parse_args(argv)
        with results_folder(arguments.out, smoke=arguments.smoke) as out:
            self.run(out, arguments.seed, self.smoke if arguments.smoke else self.full)

    def run(self, out: Path, seed: int, size: Size) -> None:
        """Measure at this size, write `out/<name>.json` and print it."""
        found = self.figures(out / (self.folder or self.name), seed, size)
        keep(out / f"{self.name}.json", found)
        self.show(found, Console())

    def figures(self, work: Path, seed: int, size: Size) -> dict[str, Any]:
        """Measure at this size, in a folder that is made if it is not there."""
        work.mkdir(parents=True, exist_ok=True)
        return self.measure(work, seed, size)


def parser(about: str | None, *, out: Path = OUT) -> argparse.ArgumentParser:
    """Make a parser of `--out`, `--seed` and `--smoke`; `about` is the module's docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=out, help="folder of the results; default: %(default)s")
    made.add_argument("--smoke", action="store_true", help=SMOKE_HELP)
    return made


@contextmanager
def results_folder(out: Path, *, smoke: bool) -> Iterator[Path]:
    """Yield the absolute path of the folder for results and say which it is; with `smoke`, a temporary one."""
    if smoke:
        with tempfile.TemporaryDirectory(prefix="fp16_patch_smoke_") as folder:
            print(f"smoke: the smallest form, in {folder}; nothing is kept", flush=True)
            yield Path(folder)
        return
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"results go to {out}", flush=True)
    yield out


def keep(path: Path, found: Any) -> None:
    """Write figures as JSON and say where they are."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"figures: {path}", flush=True)
