"""Makes the diff that lets a fork's source tree do what the patches do at run time, and says what it leaves out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fp16_patch.patching.declarations import Status, Verdict, patches_dir
from fp16_patch.patching.sources import Tree, source_of
from fp16_patch.plan.errors import PatchError, SourceError
from fp16_patch.plan.plan import Plan
from fp16_patch.releases.matrix import check_tree
from fp16_patch.releases.source_patch import rewritten

_LINES = re.compile(r"(?<=\n)")


class Done(str, Enum):
    """What becomes of a patch in an edited tree."""

    EDITED = "edited"
    UNKNOWN = "code that no patch knows"
    UNWRITTEN = "no edit known"
    LOADED = "only with fp16_patch"
    NEEDLESS = "not needed"


@dataclass(frozen=True)
class Outcome:
    """One patch: what the diff does of it, and what the edited tree goes without."""

    verdict: Verdict
    done: Done
    text: str


def diff_of(path: Path, plan: Plan) -> tuple[str, list[Outcome]]:
    """Return a unified diff for `patch -p1` in a source tree, and what it does of each patch.

    Raises:
        SourceError: there is no such directory, nothing in it is patched, or the plan cannot be had there.
    """
    verdicts, tree = check_tree(path), Tree(path)
    if plan.dtype == "float32" and any(verdict.patch.framework == "openrlhf" for verdict in verdicts):
        raise SourceError("OpenRLHF trains in bf16 or fp16 only. Fix: use --dtype float16 or bfloat16")
    edited: dict[Path, str] = {}
    outcomes = [_outcome(verdict, tree, plan, edited) for verdict in verdicts]
    return "".join(_diff(file, path, text) for file, text in sorted(edited.items())), outcomes


def complete(outcomes: Iterable[Outcome]) -> bool:
    """Return whether no patch is left out for want of an edit; where one is, roles may compute in two dtypes."""
    return not any(outcome.done in (Done.UNKNOWN, Done.UNWRITTEN) for outcome in outcomes)


def write(diff: str, output: Path) -> None:
    """Write the diff to a file.

    Raises:
        SourceError: the place is in our own checkout, which holds no code of a framework.
    """
    checkout = patches_dir().parent.resolve()
    if output.resolve().is_relative_to(checkout):
        raise SourceError(f"{output}: a diff holds code of a framework. Fix: write it outside {checkout}")
    output.write_bytes(as_bytes(diff))


def _outcome(verdict: Verdict, tree: Tree, plan: Plan, edited: dict[Path, str]) -> Outcome:
    if verdict.status is Status.EXEMPT:
        return Outcome(verdict, Done.NEEDLESS, str(verdict.exemption))
    file = tree.file(verdict.variant.module)
    if verdict.status is not Status.APPLIES or file is None:
        return Outcome(verdict, Done.UNKNOWN, f"{verdict.status.value}. {verdict.patch.why}")
    edit, why = verdict.variant.by_edit, verdict.patch.why
    if edit is None and verdict.patch.observes:
        return Outcome(verdict, Done.LOADED, f"watches or checks a run. {why}")
    if edit is None:
        return Outcome(verdict, Done.UNWRITTEN, why)
    if edit.no is not None:
        return Outcome(verdict, Done.LOADED, edit.no)
    try:
        # Two patches may edit one file, and even one function.
        text = edited[file] if file in edited else source_of(file).text
        edited[file] = rewritten(text, verdict.variant.qualname, edit, plan)
    except PatchError as problem:
        return Outcome(verdict, Done.UNWRITTEN, f"{problem}. {why}")
    return Outcome(verdict, Done.EDITED, f"but not: {edit.lost}" if edit.lost else "")


def _diff(file: Path, root: Path, text: str) -> str:
    """Return what differs, as text that `as_bytes` makes the very bytes of the file again, of whatever encoding."""
    before = source_of(file)
    mark = "\ufeff" if before.encoding == "utf-8-sig" else ""
    difference = unified(mark + before.text, mark + text, file.relative_to(root).as_posix())
    encoded = difference.encode("utf-8" if mark else before.encoding)
    return encoded.decode("utf-8", "surrogateescape")


def as_bytes(diff: str) -> bytes:
    """Return a diff as `patch` reads it: each file's lines in that file's encoding."""
    return diff.encode("utf-8", "surrogateescape")


def unified(before: str, after: str, name: str) -> str:
    """Return the difference of two texts of a file, as `patch` reads it."""
    old, new = (list(filter(None, _LINES.split(text))) for text in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
