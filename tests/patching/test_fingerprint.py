from __future__ import annotations

import pytest

from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.patching.sources import installed_file

SOURCE = '''
class Engine:
    @property
    def step(self, x):
        """Says what it does."""
        if x:  # why
            y = f"{x!r}#"
            self.go()
        return y


if True:
    def inside():
        return 1
'''


def test_comments_docstrings_and_blank_lines_do_not_count() -> None:
    other = SOURCE.replace("# why", "# another reason").replace(
        "Says what it does.", "Says more.\n\n        Much more."
    )
    other = other.replace("        return y", "\n\n        return y   ")
    assert fingerprint(other, "Engine.step") == fingerprint(SOURCE, "Engine.step")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("self.go()", "self.stop()"),
        ("            self.go()", "        self.go()"),
        ("@property", "@cached_property"),
        ('#"', '"'),
        ("(self, x)", "(self, x, z)"),
    ],
)
def test_code_counts(before: str, after: str) -> None:
    assert before in SOURCE
    assert fingerprint(SOURCE.replace(before, after), "Engine.step") != fingerprint(SOURCE, "Engine.step")


def test_the_digest_is_pinned() -> None:
    # The same on every Python: CI runs this on all of them.
    assert fingerprint(SOURCE, "Engine.step") == "0e7d85f269f1acc0"


def test_nesting_and_absence() -> None:
    assert fingerprint(SOURCE, "inside") is not None
    assert fingerprint(SOURCE, "Engine.walk") is None


def test_source_files_are_found_without_importing() -> None:
    assert installed_file("rich.table") is not None
    assert installed_file("rich") is not None
    assert installed_file("no_such_package.module") is None
    assert installed_file("rich.no_such_module") is None
