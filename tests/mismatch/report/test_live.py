"""What `watch` shows of runs while they train."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from fp16_patch.cli import main
from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.report.follow import Cluster, RecordFiles, records
from fp16_patch.mismatch.report.live import HISTORY, SourceLost, View, duration_text, sparkline, watch


def mismatch_line(step: int, mean_abs: float = 1e-3, **more: Any) -> dict[str, Any]:
    metrics = {"tokens": 65536.0, "mean_abs": mean_abs, "abs_p50": 2e-4, "abs_p99_9": 3e-2, "max_abs": 0.5, "k1": 1e-5}
    return {"step": step, "metrics": {f"mismatch/{name}": value for name, value in metrics.items()}, **more}


def step_line(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "metrics": {f"fp16/{name}": value for name, value in metrics.items()}}


def append(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def frame(runs: dict[str, list[dict[str, Any]]]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    watch(lambda: runs, console, once=True)
    return console.export_text()


def test_a_frame_shows_what_was_measured_last() -> None:
    text = frame({"run": [mismatch_line(7, 4e-3), mismatch_line(8), step_line(8, loss_scale=32768, skipped_total=3)]})

    assert re.search(r"step +8 ", text)
    assert re.search(r"mean \|d\| +1.00e-3 +█▁ +1.00e-3 … 4.00e-3 in 2 steps", text)
    for shown in (
        "65\u202f536",
        "p50 2.00e-4",
        "p99.9 3.00e-2",
        "max 0.5",
        "k1 1.00e-5",
        "32\u202f768   3 steps skipped",
    ):
        assert shown in text


def test_what_is_nearly_whole_keeps_its_digits() -> None:
    line = mismatch_line(7)
    line["metrics"] |= {"mismatch/ess": 0.999987, "mismatch/is_mean": 1.0004}
    text = frame({"run": [line]})
    assert "ESS 99.9987 %" in text
    assert "mean r 1.00" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (1e-3 / 2e-4, "5"),
        (0.99996, "1.00"),
        (1.0004, "1.00"),
        (12.01, "12.0"),
        (100.4, "100"),
        (0.3, "0.3"),
        (2e-4, "2.00e-4"),
    ],
)
def test_a_number_looks_whole_only_if_it_is(value: float, text: str) -> None:
    assert number_text(value) == text


def test_coverage_and_alerts_stand_out() -> None:
    coverage = {"tokens": 900, "expected_tokens": 1024, "ranks": 7, "expected_ranks": 8, "complete": False}
    alerts = [{"name": "k1", "value": 0.2, "threshold": 0.1, "since": 5}]
    text = frame({"run": [mismatch_line(7, coverage=coverage, alerts=alerts)]})

    assert "partial: 7 of 8 ranks, 900 of 1024 tokens" in text
    assert "▲ k1 0.2, threshold 0.1, since step 5" in text


def test_an_alert_that_no_longer_stands_is_gone() -> None:
    alerts = [{"name": "k1", "value": 0.2, "threshold": 0.1, "since": 5}]

    assert "▲" not in frame({"run": [mismatch_line(7, alerts=alerts), mismatch_line(8, alerts=[])]})
    # The two lines of a step: the second says nothing of alerts.
    assert "▲ k1" in frame({"run": [mismatch_line(7, alerts=alerts), step_line(7, loss_scale=1)]})


def test_which_side_is_not_finite_is_said() -> None:
    line = mismatch_line(3, math.nan)
    line["metrics"] |= {"mismatch/nonfinite_sampler": 12.0, "mismatch/nonfinite_learner": 0.0}
    text = frame({"run": [line]})

    assert re.search(r"mean \|d\| +NaN", text)
    assert "12 tokens of the sampler" in text
    assert "of the learner" not in text


def test_several_runs_are_shown_each_in_its_frame() -> None:
    text = frame({"[bold]one": [mismatch_line(1)], "two": [mismatch_line(40)], "three": []})

    assert "[bold]one" in text
    assert "40" in text
    assert "no step has been recorded yet" in text


def test_nothing_to_watch_is_said() -> None:
    assert "no run is here yet" in frame({})


def test_a_run_that_is_over_stays_and_is_marked() -> None:
    polls = iter([{"run": [mismatch_line(5)]}, {}])
    console = Console(width=120, record=True, file=io.StringIO())

    with pytest.raises(StopIteration):
        watch(lambda: next(polls), console, every=0)

    assert "run: over, or without an answer" in console.export_text()


def test_ctrl_c_leaves() -> None:
    polled = []

    def poll() -> dict[str, list[dict[str, Any]]]:
        polled.append(1)
        if len(polled) > 2:
            raise KeyboardInterrupt
        return {"run": [mismatch_line(len(polled))]}

    watch(poll, Console(file=io.StringIO()), every=0)
    assert len(polled) == 3


def test_the_last_steps_are_kept() -> None:
    view = View()
    view.add(mismatch_line(step) for step in range(2 * HISTORY))

    assert [*view.steps] == [*range(HISTORY, 2 * HISTORY)]


def test_a_late_correction_of_a_step_leaves_the_latest_in_view() -> None:
    whole = {"tokens": 1024, "expected_tokens": 1024, "ranks": 8, "expected_ranks": 8, "complete": True}
    view = View()
    view.add([mismatch_line(7, 5e-3, attempt="a"), mismatch_line(8, 1e-3, attempt="a")])
    view.add([mismatch_line(7, 2e-3, attempt="a", coverage=whole)])

    assert view.measured() == 8
    assert view.series("mismatch/mean_abs") == {7: 2e-3, 8: 1e-3}


def test_a_resumed_run_goes_over_its_last_steps_again() -> None:
    view = View()
    view.add([mismatch_line(step, attempt="a") for step in (1, 2, 3)] + [mismatch_line(2, 7e-3, attempt="b")])

    assert view.measured() == 2
    assert view.last("mismatch/mean_abs") == 7e-3


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▅"), ([1, 2, 3], "▁▅█"), ([1, math.nan, 3], "▁ █"), ([math.nan], ""), ([2, 2], "▅▅")],
)
def test_sparkline(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (4123, "1 h 9 min"), (187200, "2 d 4 h")]
    + [(3599, "59 min 59 s"), (3600, "1 h"), (7199, "2 h"), (86399, "1 d"), (93599, "1 d 2 h"), (604799, "7 d")],
)
def test_a_time_is_in_its_two_largest_units(seconds: int, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    append(tmp_path / "fp16_patch" / "mismatch.jsonl", mismatch_line(1), mismatch_line(2))
    yield tmp_path


def steps_of(source: RecordFiles) -> list[int]:
    return [line["step"] for lines in source.poll().values() for line in lines]


def test_files_are_followed(run: Path) -> None:
    source = RecordFiles(run)
    assert steps_of(source) == [1, 2]
    assert steps_of(source) == []

    append(run / "fp16_patch" / "mismatch.jsonl", mismatch_line(3))
    append(run / "fp16_patch" / "steps.jsonl", step_line(3))
    assert steps_of(source) == [3, 3]


def test_a_line_is_read_when_it_is_whole(run: Path) -> None:
    source, file, line = RecordFiles(run), run / "fp16_patch" / "mismatch.jsonl", json.dumps(mismatch_line(3))
    source.poll()
    with file.open("a") as lines:
        lines.write(line[:40])
        lines.flush()
        assert steps_of(source) == []
        lines.write(line[40:] + "\n")
    assert steps_of(source) == [3]


def test_a_replaced_file_is_read_anew(run: Path) -> None:
    source, file = RecordFiles(run), run / "fp16_patch" / "mismatch.jsonl"
    source.poll()
    file.unlink()
    append(file, mismatch_line(1))

    assert steps_of(source) == [1]


@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("in_place", [False, True])
def test_of_a_replaced_file_every_line_is_shown(run: Path, length: int, in_place: bool) -> None:
    """Shorter, as long and longer than what was read; another file, or the same one written over."""
    source, file = RecordFiles(run), run / "fp16_patch" / "mismatch.jsonl"
    source.poll()
    other = run / "other.jsonl"
    append(other, *(mismatch_line(step, 2e-3) for step in range(3, 3 + length)))
    if in_place:
        file.write_bytes(other.read_bytes())
    else:
        other.replace(file)

    assert steps_of(source) == [*range(3, 3 + length)]
    append(file, mismatch_line(50))
    assert steps_of(source) == [50]


def test_a_pipe_in_a_record_is_an_error_in_one_line_and_nothing_waits(run: Path) -> None:
    os.mkfifo(run / "fp16_patch" / "steps.jsonl")

    with pytest.raises(SourceLost, match="steps.jsonl cannot be read: it is not a regular file$"):
        RecordFiles(run).poll()


def test_a_line_under_a_wrong_clock_has_no_age() -> None:
    for written in (5.0, math.nan, -1e308):
        assert "ago" not in frame({"run": [mismatch_line(3, time=written)]})
    assert "0 s ago" in frame({"run": [mismatch_line(3, time=1e308)]})


def test_what_a_frame_shows_is_text() -> None:
    evil = "\x1b]0;title\x07[bold]\u202e"
    alert = {"name": evil, "value": 0.2, "threshold": 0.1, "since": 2}
    text = frame({evil: [mismatch_line(3, alerts=[alert]), mismatch_line(4, alerts=[alert], time="x", attempt=[])]})

    assert not {*text} & {"\x1b", "\x07", "\u202e"}
    assert "▲ \\x1b]0;title\\x07[bold]\\u202e" in text


@pytest.mark.parametrize("every", ["-1", "0", "nan", "inf"])
def test_a_time_between_looks_that_is_none_is_refused(run: Path, every: str) -> None:
    shown = CliRunner().invoke(main, ["watch", str(run), "--every", every])

    assert shown.exit_code == 2
    assert "--every" in shown.output and "Traceback" not in shown.output


def test_a_run_that_has_not_started_is_waited_for(tmp_path: Path) -> None:
    source = RecordFiles(tmp_path)
    assert steps_of(source) == []
    append(tmp_path / "fp16_patch" / "mismatch.jsonl", mismatch_line(1))
    assert steps_of(source) == [1]


def test_a_removed_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source = RecordFiles(tmp_path / "run")
    (tmp_path / "run").rmdir()

    with pytest.raises(SourceLost, match="run is gone$"):
        source.poll()


def test_a_history_may_be_in_envelopes_or_not() -> None:
    line = mismatch_line(4)

    other = {"name": "plan.json", "record": {}}

    assert records([{"name": "mismatch.jsonl", "record": line}, line, other]) == [line, line]


class FakeRay:
    """A cluster with named actors: what their history answers, or the error that comes instead."""

    class exceptions:  # noqa: N801
        class RayActorError(Exception):
            pass

        class GetTimeoutError(Exception):
            pass

    def __init__(self, listener: socket.socket, actors: dict[tuple[str, str], Any]) -> None:
        self.address = "{}:{}".format(*listener.getsockname())
        self.actors = actors
        self.util = SimpleNamespace(list_named_actors=self._list)

    def _list(self, all_namespaces: bool) -> list[dict[str, str]]:
        return [{"namespace": namespace, "name": name} for namespace, name in self.actors]

    def init(self, **options: Any) -> None:
        assert options["namespace"] == "fp16_patch"

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self.address)

    def get_actor(self, name: str, namespace: str) -> Any:
        return SimpleNamespace(history=SimpleNamespace(remote=lambda last: self.actors[namespace, name]))

    def wait(self, references: list[Any], **options: Any) -> None:
        pass

    def get(self, reference: Any, timeout: float) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def cluster(monkeypatch: pytest.MonkeyPatch, listener: socket.socket, actors: dict[tuple[str, str], Any]) -> Cluster:
    fake = FakeRay(listener, actors)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", fake.util)
    return Cluster("auto")


def test_the_roots_of_all_runs_are_asked(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    actors: dict[tuple[str, str], Any] = {
        ("fp16_patch", "one/root"): [mismatch_line(3)],
        ("fp16_patch", "two/root"): FakeRay.exceptions.RayActorError(),
        ("fp16_patch", "slow/root"): FakeRay.exceptions.GetTimeoutError(),
        ("fp16_patch", "one/node/1"): [mismatch_line(9)],
        ("theirs", "other/root"): [mismatch_line(9)],
    }

    assert cluster(monkeypatch, listener, actors).poll() == {"one/root": [mismatch_line(3)]}


def test_a_cluster_that_is_gone_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    source = cluster(monkeypatch, listener, {("fp16_patch", "one/root"): [mismatch_line(3)]})
    listener.close()

    with pytest.raises(SourceLost, match="^the Ray cluster at auto is gone$"):
        source.poll()


def test_without_ray_a_directory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(SourceLost, match="ray is not installed here: give the directory of a run instead"):
        Cluster("auto")


def test_the_command_without_ray_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    shown = CliRunner().invoke(main, ["watch"])

    assert (shown.exit_code, shown.output) == (
        1,
        "Error: ray is not installed here: give the directory of a run instead\n",
    )


def test_certain_tokens_without_a_log_prob_are_said_to_be_harmless() -> None:
    line = mismatch_line(3)
    line["metrics"] |= {"mismatch/nonfinite_sampler": 12.0, "mismatch/nonfinite_certain": 12.0}

    assert "12 tokens of the sampler, 12 of them certain, which is harmless" in frame({"run": [line]})


def test_the_command_prints_one_frame(run: Path) -> None:
    append(run / "fp16_patch" / "mismatch.jsonl", mismatch_line(9, time=time.time()))
    shown = CliRunner().invoke(main, ["watch", str(run), "--once"])

    assert shown.exit_code == 0, shown.output
    assert "9   0 s ago" in shown.output


def test_the_command_says_what_is_not_there() -> None:
    shown = CliRunner().invoke(main, ["watch", "no/such/run", "--once"])

    assert shown.exit_code == 1
    assert shown.output == "Error: no/such/run: no such directory. Give the output directory of a run\n"
