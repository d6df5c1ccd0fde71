"""Pages: jinja2 templates, filled in, with Plotly and our script in them, so that a page needs no other file.

Beside the templates lie `page.css` and `page.js`. Plotly's own script is in its Python package, so that nothing is
fetched, neither when a page is written nor when it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp16_patch.mismatch.report import plotly_figures
from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.untrusted.text import printable_lines

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = ("jinja2", "plotly")


class ReportExtraMissing(Fp16PatchError):
    """A page cannot be written: the packages of the extra `report` are not installed."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self.missing = missing
        verb = "is" if len(missing) == 1 else "are"
        super().__init__(
            f'a page needs {" and ".join(missing)}, which {verb} not installed. Fix: pip install "fp16-patch[report]"'
        )

    def __reduce__(self) -> tuple[type[ReportExtraMissing], tuple[tuple[str, ...]]]:
        return type(self), (self.missing,)


def require_report_extra() -> None:
    """Check that pages can be written here, without importing what writes them.

    Raises:
        ReportExtraMissing: jinja2 or plotly is not installed.
    """
    missing = tuple(name for name in PACKAGES if find_spec(name) is None)
    if missing:
        raise ReportExtraMissing(missing)


def render(template: Path, **content: Any) -> str:
    """Fill in a template, which may extend and import those in ``TEMPLATES``. All text is escaped.

    Raises:
        ReportExtraMissing: jinja2 or plotly is not installed.
    """
    require_report_extra()
    return _environment(template.parent).get_template(template.name).render(content)


@lru_cache(maxsize=8)
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_function"] = _as_json
    environment.filters["figure"] = plotly_figures.figure
    functions: dict[str, Callable[..., object]] = {
        "colour": plotly_figures.colour,
        "symbol": plotly_figures.symbol,
        "dash": plotly_figures.dash,
        # Read when a page is written: 5 MB are not to be held for the rest of a process.
        "file": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8")),
        "plotly_js": lambda: Markup(_plotly_js()),
    }
    environment.globals.update(functions)
    return environment


def _as_text(value: object) -> object:
    """Return what a template shows, with an escape in the place of whatever a browser would act on.

    Every value of a page passes here, but for what was made of such values, and our own scripts.
    """
    return value if hasattr(value, "__html__") else printable_lines(value)


def _as_json(figure: Any, **_: Any) -> str:
    """Write a Plotly figure as JSON, in which what is not finite is null, and texts are as in the rest of the page."""
    from plotly.io.json import to_json_plotly

    return str(to_json_plotly(_printable(figure.to_plotly_json())))


def _printable(content: Any) -> Any:
    if isinstance(content, str):
        return printable_lines(content)
    if isinstance(content, dict):
        return {key: _printable(value) for key, value in content.items()}
    return [_printable(value) for value in content] if isinstance(content, list | tuple) else content


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
