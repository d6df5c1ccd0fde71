"""Files of log-probs that anybody may have written: a report, or one sentence, and never more than a bounded memory."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp16_patch.cli import main
from fp16_patch.mismatch.report import dump, step_stretches
from fp16_patch.mismatch.report.dump import read_dump
from fp16_patch.mismatch.report.dump_lines import DumpError
from fp16_patch.mismatch.report.offline import analyze
from fp16_patch.mismatch.report.step_stretches import StepNumbers
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.report.test_dump import line, written


def run(*arguments: object) -> Result:
    shown = CliRunner().invoke(main, ["analyze", *map(str, arguments)])
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log_probs.jsonl"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"sampler_log_probs": ' + "[" * 100_000 + "}", "nested too deep"),
        ({"sampler_log_probs": {}, "learner_log_probs": {}}, "sampler_log_probs is {}"),
        ({"sampler_log_probs": "", "learner_log_probs": ""}, 'sampler_log_probs is ""'),
        (line(step=2**63), "step is 9223372036854775808"),
        (line(step=10**400), "step is 1000"),
        (line(token_ids=[1, 2, 3, 2**63]), "something else than token ids"),
        (line(token_ids=[1, 2, 3, True]), "something else than token ids"),
        (line(mask=[1, [], 1, 1]), "mask has [] in it"),
        ({"\x1b[2J" * 3000: 1}, "its keys: \\x1b[2J"),
    ],
    ids=["nested", "nested inside", "objects", "texts", "step", "huge step", "ids", "bools", "mask", "keys"],
)
def test_a_bad_line_is_one_sentence(file: Path, content: object, problem: str) -> None:
    shown = run(written(file, line(), content))

    assert shown.exit_code == 1
    first = shown.output.splitlines()[0]
    assert first.startswith(f"Error: {file}, line 2: ")
    assert problem in first
    assert len(first) < 500 and "\x1b" not in shown.output


@pytest.mark.parametrize("number", [2**63, 10**400, -1, 1.5, "x", {}])
def test_a_sequence_of_an_odd_name_is_called_by_its_place(file: Path, number: object) -> None:
    assert read_dump(written(file, line(), line(5e-2, sequence=number))).worst[0][1].sequence == 1


def test_what_float32_cannot_hold_is_infinite(file: Path) -> None:
    content = {"sampler_log_probs": [-1e300, -3e38, -1.0], "learner_log_probs": [-1.0, -1.0, -1.0]}
    record = analyze(written(file, content))

    assert (record.total().tokens, record.total().nonfinite_sampler) == (3, 1)
    assert run(file).exit_code == 0


def test_a_line_that_is_too_long_is_left_out_and_counted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "MAX_LINE_BYTES", 1 << 20)
    written(file, line(), line(tokens=100_000), line(), "x" * (1 << 21))

    assert read_dump(file)[0].tokens == 8
    assert read_dump(file).notes == [
        f"2 lines of more than 1 MiB left out, {file.name} line 2 first: write one line a sequence"
    ]
    assert "2 lines of more than 1 MiB left out" in " ".join(run(file).output.split())
    with pytest.raises(DumpError, match="holds no sequence; a line of more than 1 MiB left out"):
        read_dump(written(file, line(tokens=100_000)))


def test_a_hole_in_a_file_is_a_line_that_is_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "MAX_LINE_BYTES", 1 << 16)
    written(file, line())
    with file.open("ab") as sparse:
        sparse.truncate(1 << 26)
        sparse.seek(0, os.SEEK_END)
        sparse.write(b"\n" + json.dumps(line()).encode())

    assert read_dump(file)[0].tokens == 8


def test_what_is_no_file_is_left_out_and_nothing_waits(tmp_path: Path) -> None:
    written(tmp_path / "good.jsonl", line())
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "down").symlink_to(tmp_path, target_is_directory=True)

    assert read_dump(tmp_path)[0].tokens == 4
    assert read_dump(tmp_path).notes == [
        "not a regular file, and left out: loop.jsonl",
        "not a regular file, and left out: pipe.jsonl",
    ]


@pytest.mark.parametrize("path", ["/dev/zero", "x" * 5000, "loop", "nul"])
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    shown = run(tmp_path / path)

    assert shown.exit_code in (1, 2)
    assert "Traceback" not in shown.output


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip", "bomb"])
def test_a_packed_file_is_unpacked_as_it_is_read(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "MAX_LINE_BYTES", 1 << 16)
    file = written(tmp_path / "log_probs.jsonl.gz", *(line(index / 1e6) for index in range(300)))
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-40],
        "flipped": whole[:40] + bytes([whole[40] ^ 255]) + whole[41:],
        "no gzip": b"not gzip at all",
        "bomb": gzip.compress(b"0" * (1 << 26), 9),
    }[damage]
    file.write_bytes(damaged)

    with pytest.raises(
        DumpError, match="holds no sequence" if damage == "bomb" else "cannot be unpacked: .* Fix: compress"
    ):
        read_dump(file)


def test_of_many_steps_later_ones_are_measured_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [*range(40), *range(39, -1, -1), 1000, 1001, -7]
    lines = [line(-(step + 8) / 1e4, step=step, tokens=1 + step % 3) for step in steps]
    whole = read_dump(written(file, *lines))
    for name in ("MOST_STRETCHES", "FIRST_STEPS"):
        for module in (dump, step_stretches):
            monkeypatch.setattr(module, name, {"MOST_STRETCHES": 20, "FIRST_STEPS": 5}[name])
    monkeypatch.setattr(dump, "HELD_ROWS", 13)
    few = read_dump(file)

    assert len(few) <= 20 < len(whole) == 43
    assert [*few.numbers] == [*whole.numbers] == sorted({*steps})
    assert [*few] == sorted(few) and {0, 1, 2, 3, 4} <= {*few}
    assert few[0].to_dict() == whole[0].to_dict()
    totals = [MismatchStats.merge_all(each.values()).metrics() for each in (few, whole)]
    assert totals[0] == pytest.approx(totals[1], nan_ok=True)
    # A worst token keeps its own step.
    assert few.worst[0][0] == whole.worst[0][0] == 1001
    assert few.notes == [f"of 43 steps those from step 5 on are measured {few.width} at a time"]
    assert analyze(file).summary()["steps"] == 43


def test_the_numbers_of_steps_are_held_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_stretches, "HELD_NUMBERS", 8)
    numbers = StepNumbers()
    for step in (5, 3, 2**52, *range(30), *range(30), -4):
        numbers.add(step)

    assert [*numbers.sorted()] == [-4, *range(30), 2**52]
    assert [*StepNumbers().sorted()] == []


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**25), 10**25) | st.text(max_size=5) | st.floats(-9, 0),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)
KEYS = ("step", "sequence", "sampler_log_probs", "learner_log_probs", "mask", "token_ids", "rollout_log_probs")
objects = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_the_file_there_is_a_report_or_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    lines = [json.dumps(line() | data.draw(objects)) if index else json.dumps(line()) for index in range(3)]
    content = bytearray("\n".join(lines).encode())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    packed = data.draw(st.booleans())
    file = tmp_path / ("log_probs.jsonl.gz" if packed else "log_probs.jsonl")
    file.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    shown = run(file)

    assert shown.exit_code == 0 or shown.output.startswith("Error: ")
