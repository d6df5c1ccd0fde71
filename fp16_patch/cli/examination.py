"""What the doctor found, in the terminal: the verdict first, then roles and changes, then the machine."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fp16_patch.doctor import Examination


def print_examination(examination: Examination, verbose: bool = False) -> None:
    """Print it; `verbose` lists every patch instead of their number."""
    console = Console(soft_wrap=True)
    for line in _verdict(examination):
        console.print(line, highlight=False)
    if examination.roles:
        console.print(_roles(examination))
    for line in examination.overridden:
        console.print(f"overrides {line}", highlight=False, markup=False)
    for caveat in examination.caveats:
        console.print(f"note: {caveat}", highlight=False, markup=False)
    found = ", ".join(f"{name} {release}" for name, release in examination.versions.items() if release)
    console.print(f"installed: {found}", highlight=False, markup=False)
    for device in examination.hardware:
        console.print(f"device: {device['name']} ({device['facts']})", highlight=False, markup=False)
    for line in _patches(examination, verbose):
        console.print(line, highlight=False, markup=False)


def _verdict(examination: Examination) -> list[str]:
    from rich.markup import escape

    if examination.mode == "off":
        return ["[bold yellow]off[/]: nothing will change, FP16_PATCH names no mode"]
    if examination.fit:
        return [f"[bold green]fit[/] for {examination.mode}"]
    return [f"[bold red]not fit[/]: {escape(problem)}" for problem in examination.problems]


def _roles(examination: Examination) -> Table:
    table = Table("role", "computes in", "without fp16_patch")
    for role, dtype in examination.roles.items():
        table.add_row(role, dtype, examination.stock_roles[role])
    return table


def _patches(examination: Examination, verbose: bool) -> list[str]:
    if not examination.patches:
        return []
    applying = sum("applies to" in verdict for verdict in examination.patches.values())
    rest = len(examination.patches) - applying
    hint = "" if verbose or not rest else f"; {rest} are not needed here, `doctor --verbose` says why"
    counted = f"patches: {applying} of {len(examination.patches)} apply{hint}"
    return [counted, *(f"  {verdict}" for verdict in examination.patches.values() if verbose)]
