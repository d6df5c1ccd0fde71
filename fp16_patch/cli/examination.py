"""What the doctor found, in the terminal: the verdict first, then roles and changes, then the machine."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from fp16_patch.doctor import Examination
from fp16_patch.untrusted.console import TextConsole
from fp16_patch.untrusted.text import printable


def print_examination(examination: Examination, verbose: bool = False) -> None:
    """Print it; `verbose` lists every patch instead of their number."""
    console = TextConsole(soft_wrap=True)
    for verdict in _verdict(examination):
        console.print(verdict)
    if examination.roles:
        console.print(_roles(examination))
    for key in examination.overridden:
        console.print(f"overrides {key}")
    for caveat in examination.caveats:
        console.print(f"note: {caveat}")
    found = ", ".join(f"{name} {release}" for name, release in examination.versions.items() if release)
    console.print(f"installed: {found}")
    for device in examination.hardware:
        console.print(f"device: {device['name']} ({device['facts']})")
    for line in _patches(examination, verbose) if examination.mode != "off" or verbose else ():
        console.print(line)


def _verdict(examination: Examination) -> list[Text]:
    if examination.mode == "off":
        return [Text.assemble(("off", "bold yellow"), ": nothing will change")]
    if examination.fit:
        return [Text.assemble(("fit", "bold green"), f" for {examination.mode}")]
    return [Text.assemble(("not fit", "bold red"), f": {printable(problem)}") for problem in examination.problems]


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
