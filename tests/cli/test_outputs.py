"""What cannot be written is said before any work, and what fails at the end is a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fp16_patch.cli import main
from fp16_patch.mismatch.report import offline

DUMP = json.dumps({"step": 0, "sampler_log_probs": [-0.1, -0.2], "learner_log_probs": [-0.1, -0.3]})
FOLDER, LONG, NO_PLACE = "folder", "n" * 300, "/proc/no_place"
REASONS = {FOLDER: "is a folder", LONG: "file name too long", NO_PLACE: "no such file or directory", "a\0b": "NUL"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / "dump.jsonl").write_text(DUMP + "\n")
    return tmp_path


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("work began")

    for name in ("analyze", "write_record"):
        monkeypatch.setattr(offline, name, work)
    monkeypatch.setattr("fp16_patch.mismatch.record.reading.load_run", work)
    monkeypatch.setattr("fp16_patch.releases.tree_diff.diff_of", work)


COMMANDS = {
    "report": ["report", ".", "--html"],
    "analyze": ["analyze", "dump.jsonl", "--html"],
    "analyze --output": ["analyze", "dump.jsonl", "--output"],
    "probe --json": ["probe", ".", "--json"],
    "probe --html": ["probe", ".", "--html"],
    "diff": ["diff", "--source", ".", "--output"],
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("command", "place"),
    # A record is a folder.
    [(command, place) for command in COMMANDS for place in REASONS if (command, place) != ("analyze --output", FOLDER)],
)
def test_an_output_is_tried_before_any_work(here: Path, command: str, place: str) -> None:
    before = sorted(here.rglob("*"))
    shown = CliRunner().invoke(main, [*COMMANDS[command], place])
    assert shown.exit_code == 2, shown.output
    assert REASONS[place] in " ".join(shown.output.split())
    assert sorted(here.rglob("*")) == before


@pytest.mark.usefixtures("no_work")
def test_a_record_that_nothing_can_be_written_beside_is_refused_with_the_option_that_helps(here: Path) -> None:
    (here / FOLDER / "report.html").mkdir()
    shown = CliRunner().invoke(main, ["report", FOLDER])
    assert shown.exit_code == 2
    assert "--html FILE" in shown.output


def test_what_lies_at_the_place_of_an_output_is_left_alone_until_it_is_written(here: Path) -> None:
    (here / "page.html").write_text("before")
    shown = CliRunner().invoke(main, ["report", FOLDER, "--html", "page.html"])
    assert "no run record" in shown.output
    assert (here / "page.html").read_text() == "before"


def test_a_folder_for_a_record_is_made_only_for_the_record(here: Path) -> None:
    (here / "dump.jsonl").write_text("no JSON\n")
    failed = CliRunner().invoke(main, ["analyze", "dump.jsonl", "--output", "a/b/c"])
    assert failed.exit_code == 1
    assert not (here / "a").exists()
    (here / "dump.jsonl").write_text(DUMP + "\n")
    assert CliRunner().invoke(main, ["analyze", "dump.jsonl", "--output", "a/b/c"]).exit_code == 0
    assert (here / "a" / "b" / "c" / "plan.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_disk_that_is_full_at_the_end_is_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fp16_patch.mismatch.report.page.write_html", lambda records, page, *_: Path(page).write_text("much")
    )
    shown = CliRunner().invoke(main, ["analyze", "dump.jsonl", "--html", "/dev/full"])
    assert shown.exit_code == 1
    assert "/dev/full was not written, or not whole: no space left on device" in shown.output


def on_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell; in it, `$command` is ours."""
    environ = {**os.environ, "command": f"{sys.executable} -m fp16_patch.cli"}
    return subprocess.run(["bash", "-c", line], env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("$command settings --json >/dev/full", "standard output cannot be written: no space left on device", 1),
        ("$command settings >/dev/full", "standard output cannot be written: no space left on device", 1),
        ("$command settings --json >&-", "standard output is closed", 1),
        ("$command probe . --json - >&-", "standard output is closed", 2),
        ("$command settings --json | true; exit ${PIPESTATUS[0]}", "", 1),
        ("PYTHONIOENCODING=ascii $command settings --verbose >/dev/null", "", 0),
    ],
)
def test_standard_output_that_takes_nothing_is_a_sentence(line: str, said: str, code: int) -> None:
    ended = on_a_shell(line)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert (said in ended.stderr, ended.returncode) == (True, code), ended.stderr


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("-1", "not in the range 0.1<=x<=3600"),
        ("0", "not in the range 0.1<=x<=3600"),
        ("1e9", "not in the range 0.1<=x<=3600"),
        ("inf", "not in the range 0.1<=x<=3600"),
        ("nan", "nan is no number"),
        ("soon", "'soon' is not a valid float"),
    ],
)
def test_a_time_between_two_looks_is_a_time(every: str, said: str) -> None:
    shown = CliRunner().invoke(main, ["watch", ".", "--every", every])
    assert shown.exit_code == 2
    assert said in shown.output
