"""`report` and `analyze` as a person types them: where a run is found, what is said where the page cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

from click.testing import CliRunner, Result

from fp16_patch.cli import main
from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.report.rendering import PACKAGES
from tests.mismatch.report.test_dump import line, written
from tests.mismatch.report.test_report import write_record


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither jinja2 nor plotly were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fp16_patch.mismatch.report.rendering.find_spec", lambda name: None if name in PACKAGES else find(name)
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two runs of verl, as its demo leaves them."""
    for arm, d in (("bf16", 8e-3), ("fp16", 1e-3)):
        write_record(tmp_path / "out" / arm / "checkpoints" / "fp16_patch", d)
    return tmp_path / "out"


def test_a_run_is_found_one_level_down(out: Path) -> None:
    assert load_run(out / "bf16").path == out / "bf16" / "checkpoints" / "fp16_patch"
    shown = run("report", out / "bf16", out / "fp16")

    assert shown.exit_code == 0, shown.output
    assert "fp16 has the smallest mismatch: mean |d| is 1.00e-3, 8× less than in bf16." in shown.output
    assert (out / "bf16" / "report.html").is_file()


def test_of_several_runs_one_level_down_none_is_taken(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_record(tmp_path / name / "fp16_patch")

    with pytest.raises(FileNotFoundError, match=f"holds several runs.*{tmp_path / 'one'}, {tmp_path / 'two'}"):
        load_run(tmp_path)


@pytest.mark.parametrize("command", ["report", "analyze"])
def test_a_tokenizer_that_is_not_there_is_an_error(out: Path, tmp_path: Path, command: str) -> None:
    source = out / "bf16" if command == "report" else written(tmp_path / "log_probs.jsonl", line())
    shown = run(command, source, "--tokenizer", tmp_path / "nope")

    assert shown.exit_code == 1
    assert shown.output == f"Error: {tmp_path / 'nope'}: no such file or directory\n"


@pytest.mark.usefixtures("without_extra")
def test_without_the_extra_there_are_tables_and_one_line(out: Path) -> None:
    shown = run("report", out / "bf16")

    assert shown.exit_code == 0
    assert "mean |d|" in shown.output
    last = shown.output.splitlines()[-1]
    assert last.startswith("no page was written: ")
    assert last.endswith('jinja2 and plotly, which are not installed. Fix: pip install "fp16-patch[report]"')
    assert not (out / "bf16" / "report.html").exists()


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("command", ["report", "analyze"])
def test_a_page_that_was_asked_for_is_an_error_before_any_work(out: Path, tmp_path: Path, command: str) -> None:
    source = out / "bf16" if command == "report" else written(tmp_path / "log_probs.jsonl", line())
    shown = run(command, source, "--html", tmp_path / "page.html")

    assert shown.exit_code == 1
    assert shown.output.startswith("Error: a page needs jinja2 and plotly")
    assert len(shown.output.splitlines()) == 1


def test_analyze_has_no_empty_rows(tmp_path: Path) -> None:
    shown = run("analyze", written(tmp_path / "log_probs.jsonl", line()))

    assert shown.exit_code == 0, shown.output
    for row in ("plan", "wall time", "reward", "loss scale", "skipped steps", "actor compute", "sampler weights"):
        assert row not in shown.output
    assert "mean |d|" in shown.output
    assert "no dtypes were recorded" not in shown.output
