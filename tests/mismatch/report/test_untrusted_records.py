"""Records that anybody may have written: what is damaged is left out and counted, and the rest is shown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("plotly")

from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp16_patch.cli import main
from fp16_patch.mismatch.record import coverage, reading, step_lines, step_metrics
from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.report.live import View
from tests.mismatch.report.pages import Page
from tests.mismatch.report.test_report import (
    mismatch_line,
    page_of,
    printed,
    rewrite,
    stats_of,
    step_line,
    write_record,
)

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400
FILES = ("plan.json", "ledger.json", "steps.jsonl", "mismatch.jsonl")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return write_record(tmp_path / "run")


def append(record: Path, name: str, *lines: str) -> None:
    with (record / name).open("a") as file:
        file.write("".join(line + "\n" for line in lines))


def report(*arguments: object) -> Result:
    shown = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"step": 9, "metrics": ' + DEEP + "}",
        '{"step": 1e400}',
        '{"step": true}',
        f'{{"step": {HUGE}}}',
        "\0",
        "[]",
    ],
    ids=["nested", "nested inside", "infinite", "bool", "huge", "NUL", "a list"],
)
@pytest.mark.parametrize("name", ["steps.jsonl", "mismatch.jsonl"])
def test_an_unreadable_line_is_left_out_and_counted(record: Path, name: str, line: str) -> None:
    append(record, name, line, "{")
    run = load_run(record)

    assert run.notes == [
        f"{name}: the last line is cut off, and left out",
        f"{name}: 1 unreadable lines left out",
    ]
    assert run.summary()["steps"] == 3


def test_a_line_that_is_too_long_is_left_out_and_counted(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step_lines, reading):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1 << 20)
    append(record, "steps.jsonl", step_line(4) + " " * (1 << 21), step_line(5))
    run = load_run(record)

    assert [*run.steps] == [1, 2, 3, 5]
    assert run.notes == ["steps.jsonl: 1 lines of more than 1 MiB left out"]


@pytest.mark.parametrize("value", [HUGE, "NaN", "Infinity", '"x"', "null", "[]", "1e308", "-" + HUGE])
@pytest.mark.parametrize("name", ["fp16/loss_scale", "fp16/skipped_total", "critic/score/mean", "actor/grad_norm"])
def test_a_metric_that_is_no_finite_number_costs_no_other(record: Path, tmp_path: Path, name: str, value: str) -> None:
    append(record, "steps.jsonl", f'{{"step": 4, "time": {value}, "metrics": {{"{name}": {value}, "ours": 2.0}}}}')
    run = load_run(record)

    assert run.notes == []
    assert run.series("ours") == {4: 2.0}
    assert run.wall_s is not None and 0 <= run.wall_s < 100
    assert printed({"run": run})
    if name == "fp16/loss_scale":
        assert "Loss scale" in page_of({"run": run}, tmp_path)


def test_a_clock_that_is_set_back_or_on_gives_no_absurd_time(record: Path) -> None:
    lines = [
        {"step": step, "time": time, "metrics": {}}
        for step, time in enumerate([1.8e9, 1.8e9 + 5, 3, 9, 1.9e9, 1.9e9 + 2])
    ]
    (record / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert load_run(record).wall_s == 13.0
    view = View()
    view.add([{"step": 1, "time": 5.0, "metrics": {}}, {"step": 2, "time": math.nan, "metrics": {}}])
    assert view.written == 5.0


@pytest.mark.parametrize(
    "state",
    [None, [], {"version": 3, "tokens": math.nan}, {"version": 3, "tokens": -1}, "long", "negative"],
    ids=str,
)
def test_a_state_that_no_tokens_can_have_is_not_in_the_totals(record: Path, state: Any) -> None:
    if state == "long":
        state = stats_of(1e-3).to_dict() | {"worst": [[0.0] * 5] * 100_000}
    if state == "negative":
        state = stats_of(1e-3).to_dict() | {"histogram": {"bins": [0], "counts": [-8]}}
    rewrite(record, 2, state=state)
    run = load_run(record)

    assert run.total().tokens == 16
    assert ["step 2 is not in the totals" in note for note in run.notes] == [True]


def test_of_many_damaged_states_the_first_are_named(tmp_path: Path) -> None:
    record = write_record(tmp_path / "run", steps=9)
    for step in range(1, 10):
        rewrite(record, step, state={"version": 7})
    notes = load_run(record).notes

    assert len(notes) == 6
    assert notes[-1] == "mismatch.jsonl: 4 more steps are not in the totals"


@pytest.mark.parametrize(
    "ledger",
    [
        [],
        {"processes": 3, "roles": []},
        {"processes": [None, 3, {"roles": 4}, {"roles": {"actor": {"activation": {"a": 1}}}}]},
        {"roles": {"actor": None, "rollout": {"engine_weight": "float16"}, "ref": {"wire": [None, 3, ["x"]]}}},
        {"roles": {"a" * 5000: {"b" * 5000: ["c" * 5000]}}},
        {"roles": {f"role {number}": {"wire": ["float16"]} for number in range(1000)}},
    ],
    ids=["a list", "numbers", "processes", "roles", "long names", "many roles"],
)
def test_a_ledger_of_any_types_is_read_as_far_as_it_is_one(record: Path, tmp_path: Path, ledger: Any) -> None:
    (record / "ledger.json").write_text(json.dumps(ledger))
    run = load_run(record)

    assert all(
        len(name) <= 201 for name in [*run.ledger, *(quantity for row in run.ledger.values() for quantity in row)]
    )
    assert len(run.ledger) <= 256
    assert len(page_of({"run": run}, tmp_path)) < 1_000_000
    if "roles" not in ledger or "a" * 5000 not in ledger["roles"]:
        assert any(note.startswith("ledger.json") for note in run.notes)


@pytest.mark.parametrize("plan", [DEEP, HUGE, f'{{"alert_k1": {HUGE}}}', "[]", '{"mode": [], "dtype": {}, "model": 3}'])
def test_a_plan_of_any_types_is_noted(record: Path, tmp_path: Path, plan: str) -> None:
    (record / "plan.json").write_text(plan)
    run = load_run(record)

    assert any(note.startswith("plan.json") for note in run.notes)
    assert page_of({"run": run}, tmp_path)


def test_a_model_path_of_any_length_is_no_tokenizer(record: Path, tmp_path: Path) -> None:
    for model in ("m" * 5000, "a\0b", "x/" * 3000):
        (record / "plan.json").write_text(json.dumps({"mode": "fp16", "dtype": "float16", "model": model}))
        rewrite(record, 2, state={**stats_of(1e-3).to_dict(), "worst": [[-1.0, -2.0, 0, 0, 7]]})
        assert "token ids only" in page_of({"run": load_run(record)}, tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_left_out_and_nothing_waits(record: Path, name: str, damage: str) -> None:
    acts: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(path),
    }
    (record / name).unlink()
    acts[damage](record / name)

    assert [note for note in load_run(record).notes if note.startswith(name)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_left_out(record: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = os.open

    def refuse(path: Path, *settings: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *settings)

    monkeypatch.setattr(os, "open", refuse)

    assert load_run(record).notes == [f"{name} cannot be read, and is left out: permission denied"]


def test_names_and_texts_are_shown_as_text(record: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07[bold red]\u202eevil\x00</script>"
    alert = {"name": evil, "value": 0.2, "threshold": 0.1, "since": 2}
    rewrite(record, 3, alerts=[alert, {"name": 3, "since": HUGE}, None], attempt=evil)
    rewrite(record, 2, attempt="b")
    (record / "plan.json").write_text(json.dumps({"mode": evil, "dtype": evil, "model": evil, evil: [evil]}))
    (record / "ledger.json").write_text(json.dumps({"roles": {evil: {evil: [evil]}, "actor": {"activation": [evil]}}}))
    run = load_run(record)
    page = Page.of(_page({evil: run, "other": run}, tmp_path))

    for text in (page.own, json.dumps(page.figures, ensure_ascii=False), printed({evil: run})):
        assert not {*text} & {"\x1b", "\x07", "\x00", "\u202e"}
    assert "\\x1b]0;title\\x07[bold red]\\u202eevil\\x00" in printed({evil: run})
    # What the page's script switches off is called alike everywhere.
    names = {trace["legendgroup"] for _, figure in page.figures for trace in figure["data"] if "legendgroup" in trace}
    assert names == {
        attributes["data-run"] for tag, attributes in page.seen if tag == "button" and "data-run" in attributes
    }


def _page(runs: dict[str, Any], tmp_path: Path) -> str:
    page_of(runs, tmp_path)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_runs_whose_names_have_brackets_stay_apart(tmp_path: Path) -> None:
    for name in ("grpo[a]", "grpo[b]", "run[lr=1e-6]"):
        write_record(tmp_path / name)
    shown = report(*(tmp_path / name for name in ("grpo[a]", "grpo[b]", "run[lr=1e-6]")))

    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in ("grpo[a]", "grpo[b]", "run[lr=1e-6]"))


def test_of_a_long_run_the_page_has_the_extremes_and_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No object is held for a step: what is kept of any kind is bounded, and totals are over all."""
    monkeypatch.setattr(step_metrics, "EXACT_STEPS", 64)
    monkeypatch.setattr(step_metrics, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(reading, "KEPT_STEPS", 16)
    monkeypatch.setattr(coverage, "KEPT_COVERAGES", 16)
    record = write_record(tmp_path / "run", steps=300)
    rewrite(record, 157, metrics={"mismatch/mean_abs": 0.75}, coverage={"tokens": 1, "expected_tokens": 8})
    run = load_run(record)

    assert (len(run.mismatch), run.total().tokens) == (300, 2400)
    assert len(run.step_stats) <= 16 and len(run.coverage) <= 16
    series = run.series("mismatch/mean_abs")
    assert len(series) <= 130
    assert series[157] == 0.75
    assert run.summary()["reward"][-1] == 30.0
    page = page_of({"run": run}, tmp_path)
    assert len(page) < 1_000_000


def test_lines_out_of_order_and_over_again_count_once(record: Path) -> None:
    (record / "mismatch.jsonl").write_text("")
    append(record, "mismatch.jsonl", *(mismatch_line(step, step / 100) for step in (5, 3, 3, 4, 1, 5)))
    append(record, "mismatch.jsonl", mismatch_line(3, 7e-2), mismatch_line(4, 1.0)[:-9])
    run = load_run(record)

    assert run.series("mismatch/mean_abs") == pytest.approx({1: 0.01, 3: 0.07, 4: 0.04, 5: 0.05})
    assert run.total().tokens == 32
    assert run.notes == ["mismatch.jsonl: the last line is cut off, and left out"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("step", "time", "attempt", "metrics", "coverage", "alerts", "state", "noise_floor", "processes", "roles")
objects = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), json_values, max_size=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = write_record(tmp_path_factory.mktemp("whole") / "run", steps=4)
    rewrite(record, 2, noise_floor=stats_of(1e-4).to_dict(), coverage={"tokens": 3, "expected_tokens": 9})
    rewrite(record, 3, alerts=[{"name": "k1", "value": 0.2, "threshold": 0.1, "since": 2}], attempt="b")
    return record


@given(st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_in_the_files_there_is_a_report(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A file is cut off, has bits flipped, or has any JSON in its lines."""
    folder = tmp_path_factory.mktemp("damaged")
    damaged = data.draw(st.sampled_from(FILES))
    for name in FILES:
        content = (whole / name).read_bytes()
        if name == damaged:
            content = _damaged(content, data)
        (folder / name).write_bytes(content)
    shown = report(folder, "--html", folder / "page.html")

    assert shown.exit_code == 0, shown.output
    assert Page.read(folder / "page.html").open == []


def _damaged(content: bytes, data: st.DataObject) -> bytes:
    kind = data.draw(st.sampled_from(["cut", "flipped", "replaced", "merged"]))
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    if kind == "flipped":
        flipped = bytearray(content)
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            flipped[place] ^= 1 << data.draw(st.integers(0, 7))
        return bytes(flipped)
    lines = content.splitlines()
    index = data.draw(st.integers(0, len(lines) - 1))
    drawn = data.draw(objects)
    if kind == "merged":
        drawn = json.loads(lines[index]) | drawn
    lines[index] = json.dumps(drawn).encode()
    return b"\n".join(lines)
