"""The pages hang together: every link leads somewhere, and the front page stays short."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_README = 200
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_ELSEWHERE = ("http://", "https://", "mailto:")


def _pages() -> list[Path]:
    """The checkout's Markdown files; none where this is not a checkout."""
    if not (ROOT / ".git").exists():
        return []
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    return sorted(path for name in set(listed) if (path := ROOT / name).is_file())


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [problem for link in _links(page) if (problem := _problem(page, link))] == []


def test_links_and_headings_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[one](other.md#it-is-here) ![two](#a-page)\n```\n[no](link)\n```\n## It is `x`: *here*\n"
    )
    assert list(_links(page)) == ["other.md#it-is-here", "#a-page"]
    assert _anchors(page) == {"a-page", "it-is-x-here"}
    assert _problem(page, "#a-page") is None
    assert _problem(page, "other.md") == "other.md: no such file"
    assert _problem(page, "#elsewhere") == "#elsewhere: page.md has no such heading"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def _links(page: Path) -> Iterator[str]:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (link for link in _LINK.findall(text) if not link.startswith(_ELSEWHERE))


def _problem(page: Path, link: str) -> str | None:
    path, _, anchor = unquote(link).partition("#")
    target = page if not path else page.parent / path
    if not target.exists():
        return f"{link}: no such file"
    if anchor and anchor not in _anchors(target):
        return f"{link}: {target.name} has no such heading"
    return None


@cache
def _anchors(page: Path) -> set[str]:
    """What a heading is called in a link: lower case, no punctuation, spaces as hyphens; the second of a name is -1."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return anchors
