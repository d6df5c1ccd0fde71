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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp16_patch.cli import main
from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.report import dump
from fp16_patch.mismatch.report.dump import read_dump
from fp16_patch.mismatch.report.dump_lines import DumpError
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
        line(-float(torch.rand((), generator=generator)), tokens=1 + index % 13, step=index % 3) for index in range(60)
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
        ("logprobs", "prox_logp", "loss_mask"),
        ("rollout_logprobs", "action_log_probs", "loss_mask"),
        ("rollout_per_token_logps", "old_per_token_logps", "completion_mask"),
        ("vllm_logprobs", "old_logprobs", "response_mask"),
        ("vllm_logprobs", "local_logprobs", "response_masks"),
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
    second["learner_log_probs"][1] -= 2.0
    stats = read_dump(written(file, line(1e-3), second))[0]
    worst = stats.worst_tokens()[0]

    assert (worst.sequence, worst.position, worst.token_id) == (1, 1, 6)
    assert worst.d == pytest.approx(-1.999)
    assert math.exp(worst.sampler) == pytest.approx(math.exp(-1.125))


@pytest.mark.parametrize(
    ("content", "problem", "fix"),
    [
        ('{"step": 1', "not JSON", "leave out a last line that a killed run did not finish"),
        ("[1, 2]", "a JSON list, not an object", "write one JSON object a line"),
        ({"logprobs": [], "a": 1}, "its keys: a, logprobs", "rollout_log_probs with old_log_probs (verl)"),
        ({"logprobs": [], "a": 1}, "are not in it", "name yours with --sampler-key and --learner-key"),
        (
            {"old_log_probs": None, "rollout_log_probs": [-1.0]},
            "old_log_probs is null",
            "name yours with --sampler-key",
        ),
        (line(step=1.5), "step is 1.5", "an integer"),
        (line(step=math.nan), "step is NaN", "an integer"),
        (line(token_ids=[1, 2, 3, 4.5]), "something else than token ids", "give 4 integers"),
        (
            {"sampler_log_probs": [[-1.0], [-2.0]], "learner_log_probs": [-1.0, -2.0]},
            "sampler_log_probs is a list of 2 lists; learner_log_probs is a list of 2 numbers",
            "all of them as lists of as many such lists",
        ),
        (
            {"sampler_log_probs": [[-1.0], [-2.0]], "learner_log_probs": [[-1.0]]},
            "sampler_log_probs is a list of 2 lists; learner_log_probs is a list of 1 lists",
            "all of them as lists of as many such lists",
        ),
        (
            {"sampler_log_probs": [[[-1.0]]], "learner_log_probs": [[[-1.0]]]},
            "sampler_log_probs[0] is [-1.0]",
            "list of n",
        ),
        (line(step="one"), 'step is "one"', "an integer"),
        (line() | {"learner_log_probs": [-1.0]}, "has 4 entries, learner_log_probs has 1", "the same tokens"),
        (line() | {"learner_log_probs": -1.0}, "learner_log_probs is -1.0", "give a list of numbers"),
        (line() | {"sampler_log_probs": [-1, [2]]}, "sampler_log_probs[1] is [2]", "give a number, or null"),
        (line() | {"sampler_log_probs": [-1, 10**400]}, "sampler_log_probs[1] is 1000", "give a number, or null"),
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


def test_the_first_line_of_an_error_is_the_reason(file: Path) -> None:
    with pytest.raises(DumpError) as caught:
        read_dump(written(file, {"a": [1]}))

    assert max(map(len, str(caught.value).removeprefix(str(file)).splitlines())) < 200


def test_a_key_that_is_not_there_is_named_beside_those_that_are(file: Path) -> None:
    shown = CliRunner().invoke(main, ["analyze", str(written(file, line())), "--sampler-key", "foo"])

    assert shown.exit_code == 1
    assert (
        "line 1: no key foo; there are: learner_log_probs, sampler_log_probs. Fix: give --sampler-key" in shown.output
    )
    assert len(shown.output.splitlines()) == 1


def test_a_null_field_falls_through_to_the_next_known_name(file: Path) -> None:
    names = {"sampling_per_token_logps": [-1.0, -2.0], "old_per_token_logps": None, "per_token_logps": [-1.5, -2.0]}
    assert read_dump(written(file, names | {"step": None, "completion_mask": None}))[0].d_sum == -0.5

    across = {"rollout_log_probs": [-1.0], "old_log_probs": None, "action_log_probs": None, "log_probs": [-3.0]}
    assert read_dump(written(file, across))[0].d_sum == -2.0
    first = names | {"old_per_token_logps": [-1.25, -2.0]}
    assert read_dump(written(file, first))[0].d_sum == -0.25


values = st.floats(-20.0, 0.0)


@st.composite
def sequences(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Sequences of one step as one line each, without what may be left out."""
    lines = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 6))
        sides = (draw(st.lists(values, min_size=size, max_size=size)) for _ in range(2))
        mask = draw(st.lists(st.sampled_from([0, 1]), min_size=size, max_size=size))
        ids = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
        lines.append(
            dict(zip(("sampler_log_probs", "learner_log_probs"), sides, strict=True), mask=mask, token_ids=ids)
        )
    return lines


@given(sequences(), st.integers(0, 1000))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_how_a_sequence_is_written_makes_no_difference(tmp_path: Path, lines: list[dict[str, Any]], step: int) -> None:
    """A line each or a batch a line, whole numbers as floats, truth values as a mask: one reading."""
    plain = read_dump(written(tmp_path / "plain.jsonl", *(content | {"step": step} for content in lines)))
    batch = {name: [content[name] for content in lines] for name in lines[0]} | {"step": float(step)}
    floats = [
        content
        | {"step": float(step), "mask": [float(bit) for bit in content["mask"]], "sequence": float(index)}
        | {"token_ids": [float(token) for token in content["token_ids"]]}
        for index, content in enumerate(lines)
    ]
    bools = [content | {"step": step, "mask": [bool(bit) for bit in content["mask"]]} for content in lines]

    assert list(plain) == [step]
    for name, written_so in (("batch", [batch]), ("floats", floats), ("bools", bools)):
        read = read_dump(written(tmp_path / f"{name}.jsonl", *written_so))
        assert list(read) == [step]
        assert read[step].to_dict() == plain[step].to_dict(), name


def test_steps_and_names_of_a_batch_may_be_lists(file: Path) -> None:
    nested = {name: [values, values] for name, values in line().items()}
    nested["learner_log_probs"] = [line(d)["learner_log_probs"] for d in (0.1, 0.2)]
    steps = read_dump(written(file, nested | {"step": [3, 4.0], "sequence": [70, 80]}))

    assert {step: stats.worst_tokens()[0].sequence for step, stats in steps.items()} == {3: 70, 4: 80}


@given(st.lists(values, min_size=1, max_size=8), st.sampled_from(["sampler_log_probs", "learner_log_probs"]), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_above_0_are_refused_before_any_figure(
    tmp_path: Path, sides: list[float], key: str, data: st.DataObject
) -> None:
    above = data.draw(st.floats(0.51, 1e6))
    place = data.draw(st.integers(0, len(sides) - 1))
    content: dict[str, Any] = {"sampler_log_probs": sides, "learner_log_probs": sides}
    content[key] = [above if index == place else value for index, value in enumerate(sides)]
    file = tmp_path / "log_probs.jsonl"

    with pytest.raises(DumpError, match=rf"line 1: {key}\[{place}\] is .*: a log-prob is not above 0") as caught:
        read_dump(written(file, content))
    assert "nothing is computed from them" in str(caught.value)
    # Where it was not sampled it does not matter, and rounding may leave a little above 0.
    hidden = content | {"mask": [int(index != place) for index in range(len(sides))]}
    assert read_dump(written(file, hidden))[0].tokens == len(sides) - 1
    content[key][place] = data.draw(st.floats(0.0, 0.5))
    assert read_dump(written(file, content))[0].tokens == len(sides)


@pytest.mark.parametrize(
    ("given_values", "fix"),
    [
        ([0.9, 0.2, 0.7], "the logarithms of probabilities"),
        ([0.1, 2.3, 1.6], "with a minus sign"),
        ([12.5, -3.0, 4.0], "not logits"),
        ([57.9, 56.8, 53.1], "not logits"),
    ],
)
def test_what_was_given_instead_of_log_probs_is_guessed(file: Path, given_values: list[float], fix: str) -> None:
    content = {"sampler_log_probs": [-1.0, -2.0, -1.5], "learner_log_probs": given_values}
    with pytest.raises(DumpError, match=rf"Fix: give .*{fix}"):
        read_dump(written(file, content))


def test_what_open_instruct_writes_for_a_missing_log_prob_is_missing(file: Path) -> None:
    stats = read_dump(written(file, {"vllm_logprobs": [-1.0, 1.0], "local_logprobs": [-1.0, -1e-5]}))[0]

    assert (stats.tokens, stats.nonfinite_sampler, stats.sampler_positive_count) == (2, 1, 0)


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
    # Before any work: what is to be read is not even there.
    early = CliRunner().invoke(main, ["analyze", str(tmp_path / "nope"), "--out", str(tmp_path / "run")])
    assert early.output == again.output


def test_the_command_says_what_is_wrong(file: Path) -> None:
    shown = CliRunner().invoke(main, ["analyze", str(written(file, {"a": 1}))])

    assert shown.exit_code == 1
    assert shown.output.startswith(f"Error: {file}, line 1: the log-probs of sampler and learner are not in it")
