"""Per-token log-probs from files that any trainer wrote, and the command that compares them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fp16_patch.cli import main
from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.report import dump
from fp16_patch.mismatch.report.dump import DumpError, read_dump
from fp16_patch.mismatch.statistics.summary import MismatchStats


def line(d: float = 1e-3, tokens: int = 4, **more: Any) -> dict[str, Any]:
    sampler = [-1.0 - place / 8 for place in range(tokens)]
    return {"sampler_log_probs": sampler, "learner_log_probs": [value + d for value in sampler], **more}


def written(path: Path, *lines: object) -> Path:
    text = "".join((content if isinstance(content, str) else json.dumps(content)) + "\n" for content in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log_probs.jsonl"


def test_sequences_are_compared_by_step(file: Path) -> None:
    written(file, line(1e-3, step=2), line(2e-3, step=1, tokens=7), "", line(-3e-3, step=2, tokens=1))
    steps = read_dump(file)

    assert list(steps) == [1, 2]
    assert (steps[2].tokens, steps[2].sequences) == (5, 2)
    assert steps[1].metrics()["mismatch/mean_abs"] == pytest.approx(2e-3)
    assert steps[2].metrics()["mismatch/seq_mean_abs"] == pytest.approx((4e-3 + 3e-3) / 2)


def test_without_a_step_all_is_step_0(file: Path) -> None:
    assert list(read_dump(written(file, line(), line()))) == [0]


def test_what_the_mask_leaves_out_does_not_count(file: Path) -> None:
    first = line(tokens=4, mask=[0, 1, True, 0])
    first["sampler_log_probs"][0] = None
    stats = read_dump(written(file, first, line(tokens=2, mask=[0, 0])))[0]

    assert (stats.tokens, stats.sequences, stats.nonfinite_tokens) == (2, 1, 0)


@pytest.mark.parametrize("text", ["null", '"NaN"', "NaN", "-Infinity", '"inf"'])
def test_what_is_not_finite_is_counted_by_side(file: Path, text: str) -> None:
    written(file, '{"sampler_log_probs": [-1.0, ' + text + '], "learner_log_probs": [-1.5, -1.0]}')
    stats = read_dump(file)[0]

    assert (stats.tokens, stats.nonfinite_sampler, stats.nonfinite_learner) == (2, 1, 0)
    assert stats.metrics()["mismatch/mean_abs"] == 0.5


def test_batches_change_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = [
        line(float(torch.randn((), generator=generator)), tokens=1 + index % 13, step=index % 3) for index in range(60)
    ]
    whole = read_dump(written(file, *lines))
    monkeypatch.setattr(dump, "BATCH_TOKENS", 20)
    batched = read_dump(file)

    for step in (0, 1, 2):
        assert batched[step].metrics() == pytest.approx(whole[step].metrics(), nan_ok=True)
        assert torch.equal(batched[step].histogram, whole[step].histogram)


def test_no_more_than_a_batch_is_held(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "BATCH_TOKENS", 32)
    compared: list[int] = []
    compare = MismatchStats.from_log_probs

    def from_log_probs(sampler: torch.Tensor, *arguments: Any, **options: Any) -> MismatchStats:
        compared.append(sampler.numel())
        return compare(sampler, *arguments, **options)

    monkeypatch.setattr(MismatchStats, "from_log_probs", from_log_probs)
    read_dump(written(file, *(line(tokens=1 + index % 9, step=index % 2) for index in range(40)), line(tokens=50)))

    assert max(compared) == 50
    assert sorted(compared)[-2] <= 32


def test_a_packed_file_and_a_directory_are_read(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"step_{rank}").mkdir()
        written(tmp_path / f"step_{rank}" / "rank_0.jsonl.gz", line(step=rank))
    written(tmp_path / "notes.txt", "not a dump")

    assert {step: stats.tokens for step, stats in read_dump(tmp_path).items()} == {0: 4, 1: 4}


@pytest.mark.parametrize(
    ("sampler", "learner", "mask"),
    [
        ("rollout_log_probs", "old_log_probs", "response_mask"),
        ("rollout_log_probs", "action_log_probs", "action_mask"),
        ("rollout_log_probs", "log_probs", "loss_masks"),
        ("sampling_per_token_logps", "old_per_token_logps", "completion_mask"),
        ("generation_logprobs", "prev_logprobs", "token_mask"),
        ("inference_logprobs", "trainer_logprobs", "loss_mask"),
    ],
)
def test_the_names_of_frameworks_are_known(file: Path, sampler: str, learner: str, mask: str) -> None:
    written(file, {sampler: [-1.0, -2.0, -3.0], learner: [-1.5, -2.0, -9.0], mask: [1, 1, 0]})
    stats = read_dump(file)[0]

    assert (stats.tokens, stats.d_sum) == (2, -0.5)


def test_a_user_may_name_the_keys(file: Path) -> None:
    written(file, {"vllm": [-1.0, -2.0], "fsdp": [-1.25, -2.0], "loss_mask": [1, 0]})
    stats = read_dump(file, "vllm", "fsdp")[0]

    # The mask is found all the same: without it a token that was not sampled would count.
    assert (stats.tokens, stats.d_sum) == (1, -0.25)


def test_the_worst_token_is_named(file: Path) -> None:
    second = line(1e-3, tokens=3, token_ids=[5, 6, 7])
    second["learner_log_probs"][1] += 2.0
    stats = read_dump(written(file, line(1e-3), second))[0]
    worst = stats.worst_tokens()[0]

    assert (worst.sequence, worst.position, worst.token_id) == (1, 1, 6)
    assert worst.d == pytest.approx(2.001)
    assert math.exp(worst.sampler) == pytest.approx(math.exp(-1.125))


@pytest.mark.parametrize(
    ("content", "problem", "fix"),
    [
        ('{"step": 1', "not JSON", "leave out a last line that a killed run did not finish"),
        ("[1, 2]", "a JSON list, not an object", "write one JSON object a line"),
        ({"logprobs": [], "a": 1}, "its keys: a, logprobs", "rollout_log_probs with old_log_probs (verl)"),
        ({"logprobs": [], "a": 1}, "are not in it", "name yours with --sampler-key and --learner-key"),
        (line(step="one"), 'step is "one"', "an integer"),
        (line() | {"learner_log_probs": [-1.0]}, "has 4 entries, learner_log_probs has 1", "the same tokens"),
        (line() | {"learner_log_probs": -1.0}, "learner_log_probs is -1.0", "give a list of numbers"),
        (line() | {"sampler_log_probs": [-1, [2]]}, "sampler_log_probs[1] is [2]", "give a number, or null"),
        (line() | {"sampler_log_probs": [-1, "x"]}, 'sampler_log_probs[1] is "x"', "give a number, or null"),
        (line(mask=[1]), "mask has 1 entries, the log-probs have 4", "give 4 of 0 and 1"),
        (line(mask=[1, 1, 0.5, 1]), "mask has 0.5 in it", "give 4 of 0 and 1"),
        (line(token_ids=[1]), "token_ids has 1 entries, the log-probs have 4", "or leave token_ids out"),
        (line(token_ids=[1, 2, 3, None]), "something else than token ids", "give 4 integers"),
    ],
)
def test_a_wrong_line_is_named_with_its_fix(file: Path, content: object, problem: str, fix: str) -> None:
    with pytest.raises(DumpError) as caught:
        read_dump(written(file, line(), content))

    message = str(caught.value)
    assert message.startswith(f"{file}, line 2: ")
    assert problem in message.split("Fix: ")[0]
    assert fix in message.split("Fix: ")[1]


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "log_probs.jsonl.gz", *(line() for _ in range(200)))
    file.write_bytes(file.read_bytes()[:-20])

    with pytest.raises(DumpError, match="cannot be unpacked: .* Fix: compress it again"):
        read_dump(file)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match=r"empty.jsonl: holds no sequence"):
        read_dump(written(tmp_path / "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DumpError, match=r"no file ends in .jsonl or .jsonl.gz"):
        read_dump(tmp_path / "folder")


def analyze(*arguments: object) -> str:
    shown = CliRunner().invoke(main, ["analyze", *map(str, arguments)])
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_the_command_sets_files_side_by_side(tmp_path: Path) -> None:
    bf16, fp16 = written(tmp_path / "bf16.jsonl", line(8e-3)), written(tmp_path / "fp16.jsonl", line(1e-3))
    text = " ".join(analyze(bf16, fp16, "--html", tmp_path / "page.html").split())

    assert "fp16.jsonl has the smallest mismatch: mean |d| is 1.00e-3, 8× less than in bf16.jsonl." in text
    assert text.count("→ ") >= 2, "each file has a diagnosis with advice"
    assert "8× less" in (tmp_path / "page.html").read_text()


def test_figures_are_json(file: Path) -> None:
    first = line(step=3)
    first["learner_log_probs"][0] = None
    figures = json.loads(analyze(written(file, first), "--json"))["log_probs.jsonl"]

    assert figures["metrics"]["mismatch/nonfinite_learner"] == 1
    assert figures["steps"]["3"]["mismatch/mean_abs"] == pytest.approx(1e-3)
    assert {"cause", "evidence", "advice"} <= figures["diagnosis"][0].keys()


def test_a_record_is_written_for_the_report(file: Path, tmp_path: Path) -> None:
    written(file, line(1e-3, step=1), line(2e-3, step=2))
    analyze(file, "--out", tmp_path / "run")
    run = load_run(tmp_path / "run")

    assert run.series("mismatch/mean_abs") == pytest.approx({1: 1e-3, 2: 2e-3})
    assert run.total().tokens == 8
    again = CliRunner().invoke(main, ["analyze", str(file), "--out", str(tmp_path / "run")])
    assert again.exit_code == 1
    assert "holds a record already (plan.json, mismatch.jsonl). Give another directory" in again.output


def test_the_command_says_what_is_wrong(file: Path) -> None:
    shown = CliRunner().invoke(main, ["analyze", str(written(file, {"a": 1}))])

    assert shown.exit_code == 1
    assert shown.output.startswith(f"Error: {file}, line 1: the log-probs of sampler and learner are not in it")
