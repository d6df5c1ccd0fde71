"""`fp16-patch matrix`."""

from __future__ import annotations

import sys

import click


@click.command("matrix")
@click.option(
    "--check",
    "checked",
    multiple=True,
    metavar="PACKAGE[==RELEASE]",
    help="Say which patches hold for it; without a release, for the newest.",
)
@click.option("--add", "added", multiple=True, metavar="PACKAGE==RELEASE", help="Declare it for the patches that hold.")
def command(checked: tuple[str, ...], added: tuple[str, ...]) -> None:
    """Show which patch is for which release; check or add one.

    Nothing is installed for it. A patch holds if the code it changes is, in that release, code it was written for. What
    --add finds changed is shown as a diff, for a person to look at. Exit code 0: each holds or is not needed, 1: not.

    \b
    Examples:
      fp16-patch matrix
      fp16-patch matrix --check verl==0.9.0 --check openrlhf==0.11.1
      fp16-patch matrix --add verl==0.9.2
    """
    from fp16_patch.patching.declarations import declared_patches
    from fp16_patch.releases import matrix as releases
    from fp16_patch.releases import tables
    from fp16_patch.untrusted.console import TextConsole

    console, hold = TextConsole(piped_width=160), True
    # All of them first: what is refused is said before anything is judged, or written.
    asked, new = ([releases.Release.parse(text) for text in texts] for texts in (checked, added))
    for release, verdicts in zip(asked, releases.check_releases(asked), strict=True):
        tables.print_verdicts(str(release), verdicts, console)
        hold &= releases.covered(verdicts)
    for release in new:
        verdicts, diffs = releases.add_release(release)
        tables.print_verdicts(str(release), verdicts, console)
        tables.print_diffs(diffs, console)
        hold &= releases.covered(verdicts)
    if not checked and not added:
        tables.print_matrix(declared_patches(), console)
    sys.exit(0 if hold else 1)
