"""A framework's own tests are compared by name: what passes alone is to pass with us."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from integration.matrix import own_tests

# As pytest writes it.
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a_on_cpu" name="test_passes" time="0.1" />
<testcase classname="tests.test_a_on_cpu" name="test_of_engines[1]"{open}
<testcase classname="tests.test_a_on_cpu" name="test_fails"><failure message="assert False">where</failure></testcase>
<testcase classname="tests.test_a_on_cpu" name="test_of_gpus"><skipped message="needs a GPU" /></testcase>
</testsuite></testsuites>"""
FAILED = '><failure message="AttributeError: no such&#10;more">where</failure></testcase>'


def results(passes: bool) -> dict[str, str | None]:
    return dict(own_tests._results(ElementTree.fromstring(REPORT.format(open=" />" if passes else FAILED))))


def test_what_is_lost_in_a_mode_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tests, "run", lambda mode, folder, arguments: results(mode != "fp16"))
    assert own_tests.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "off: 2 of 4 pass",
        "observe: 2 of those pass",
        "fp16: 1 of those pass",
        "  tests.test_a_on_cpu::test_of_engines[1]: AttributeError: no such",
    ]
    monkeypatch.setattr(own_tests, "run", lambda mode, folder, arguments: results(True))
    assert own_tests.main([str(tmp_path)]) == 0


def test_a_test_that_is_not_run_with_us_is_lost() -> None:
    assert own_tests.lost({"a": None, "b": "fails"}, {}) == {"a": "not run"}
