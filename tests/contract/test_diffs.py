"""The diff for the source of the framework that is installed: it applies, and leaves Python that is known no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp16_patch.patching.declarations import declared_patches, installed_release
from fp16_patch.plan.plan import Plan
from fp16_patch.releases.tree_diff import Done, diff_of
from tests.edited import edited_copy

PACKAGES = [name for name in ("verl", "openrlhf", "deepspeed") if installed_release(name)]
pytestmark = [pytest.mark.verl, pytest.mark.openrlhf]
if not PACKAGES:
    pytest.skip("needs a framework", allow_module_level=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_it_applies_once_and_leaves_python(package: str, tmp_path: Path) -> None:
    diff, outcomes = edited_copy((package,), tmp_path)
    edited = {outcome.verdict.patch.name for outcome in outcomes if outcome.done is Done.EDITED}
    assert edited
    for name in [line.removeprefix("+++ b/") for line in diff.splitlines() if line.startswith("+++ b/")]:
        compile((tmp_path / name).read_text(), name, "exec")
    again, outcomes = diff_of(tmp_path, Plan())
    assert again == ""
    # Needless: where the release that the tree is most like does without, and the code was that of another.
    gone = (Done.UNKNOWN, Done.NEEDLESS)
    assert edited <= {outcome.verdict.patch.name for outcome in outcomes if outcome.done in gone}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_patch_that_has_an_edit_for_this_release_is_left_out(package: str, tmp_path: Path) -> None:
    _, outcomes = edited_copy((package,), tmp_path)
    done = {outcome.verdict.patch.name: outcome.done for outcome in outcomes}
    for patch in declared_patches():
        written = patch.package == package and (verdict := patch.verify()).variant.by_edit
        if written and written.no is None and verdict.status.value == "applies":
            assert done[patch.name] is Done.EDITED, patch.name
