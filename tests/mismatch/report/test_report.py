"""Reading run records, whole and damaged, and what the comparison and the page say about them."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from rich.console import Console

from fp16_patch.mismatch.diagnosis import findings
from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record import reading as record_module
from fp16_patch.mismatch.record.reading import RunRecord, load_run
from fp16_patch.mismatch.record.step_metrics import StepMetrics
from fp16_patch.mismatch.report.comparison import CAUSES, cause_text, key_figures, print_comparison, print_diagnosis
from fp16_patch.mismatch.report.decoding import visible
from fp16_patch.mismatch.report.page import write_html
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.report.pages import MOST_BYTES, Page

FLOAT16_LEDGER = {
    "actor": {"activation": ["float16"], "gradient": ["float32"], "master": ["float32"], "wire": ["float32"]},
    "rollout": {"engine_weight": ["torch.float16"], "kv_cache": ["float16"], "logits": ["float32"]},
}


def stats_of(d: float, tokens: int = 4) -> MismatchStats:
    sampler = torch.full((2, tokens), -1.0, dtype=torch.float64)
    return MismatchStats.from_log_probs(sampler, sampler + d, torch.ones_like(sampler))


def mismatch_line(step: int, d: float) -> str:
    stats = stats_of(d)
    return json.dumps({"step": step, "time": 100.0 + step, "metrics": stats.metrics(), "state": stats.to_dict()})


def uneven_stats(scale: float, token_ids: bool = True) -> MismatchStats:
    """Tokens of many probabilities, in sequences of several lengths; the worst is the 1. of the sequence 3, id 7."""
    generator = torch.Generator().manual_seed(0)
    sampler = -torch.rand(6, 40, generator=generator, dtype=torch.float64).pow(3) * 8
    learner = sampler + scale * torch.randn(sampler.shape, generator=generator, dtype=torch.float64)
    learner[3, 0] = sampler[3, 0] - 5.0
    mask = torch.arange(40) < torch.tensor([[1], [2], [5], [11], [30], [40]])
    ids = torch.arange(sampler.numel()).view(sampler.shape) % 113
    return MismatchStats.from_log_probs(sampler, learner, mask, token_ids=ids if token_ids else None)


def rewrite(record: Path, step: int, **fields: Any) -> None:
    """Other fields for a line of mismatch.jsonl; ``stats`` for its state and metrics."""
    if stats := fields.pop("stats", None):
        fields |= {"state": stats.to_dict(), "metrics": stats.metrics()}
    lines = [json.loads(line) for line in (record / "mismatch.jsonl").read_text().splitlines()]
    changed = [line | fields if line["step"] == step else line for line in lines]
    (record / "mismatch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def step_line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 100.0 + 10 * step, "metrics": {"critic/score/mean": step / 10, **metrics}})


def write_record(
    folder: Path, d: float = 1e-3, dtype: str | None = "float16", ledger: dict[str, Any] | None = None, steps: int = 3
) -> Path:
    folder.mkdir(parents=True)
    numbers = range(1, steps + 1)
    (folder / "plan.json").write_text(json.dumps({"mode": "fp16", "dtype": dtype, "init_scale": 65536.0}))
    (folder / "mismatch.jsonl").write_text("".join(mismatch_line(step, d) + "\n" for step in numbers))
    metrics = [
        {"fp16/loss_scale": 65536.0 / 2 ** (step > 1), "fp16/step_skipped": float(step == 1), "fp16/skipped_total": 1}
        for step in numbers
    ]
    (folder / "steps.jsonl").write_text(
        "".join(step_line(step, **row) + "\n" for step, row in zip(numbers, metrics, strict=True))
    )
    ledger = FLOAT16_LEDGER if ledger is None else ledger
    (folder / "ledger.json").write_text(json.dumps({"processes": [{"rank": 0, "roles": ledger}], "roles": ledger}))
    return folder


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return write_record(tmp_path / "run" / "fp16_patch")


def shown(runs: dict[str, RunRecord], tmp_path: Path) -> Page:
    write_html(runs, tmp_path / "page.html", "a <title> & more")
    return Page.read(tmp_path / "page.html")


def page_of(runs: dict[str, RunRecord], tmp_path: Path) -> str:
    """The page but for Plotly's own script."""
    return shown(runs, tmp_path).own


def printed(runs: dict[str, RunRecord]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    print_comparison(runs, console)
    return console.export_text()


def test_summary(record: Path) -> None:
    summary = load_run(record).summary()

    assert {key: summary[key] for key in ("steps", "tokens", "wall_s", "loss_scale", "skipped")} == {
        "steps": 3,
        "tokens": 24,
        "wall_s": 20.0,
        "loss_scale": 32768.0,
        "skipped": 1,
    }
    assert summary["reward"] == [0.1, 0.2, 0.3]
    assert summary["ledger"]["rollout"] == {
        "engine_weight": ["float16"],
        "kv_cache": ["float16"],
        "logits": ["float32"],
    }
    assert summary["mismatch"] == pytest.approx(
        {
            "mean_abs": 1e-3,
            "max_abs": 1e-3,
            "seq_mean_abs": 4e-3,
            "k1": -1e-3,
            "k3": math.expm1(1e-3) - 1e-3,
            "prob_mean_abs": math.exp(-1) * math.expm1(1e-3),
        }
    )


def test_a_parent_of_the_record_will_do(record: Path) -> None:
    assert load_run(record.parent).path == record
    assert load_run(record).notes == []


def test_no_record_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_run(tmp_path)

    message = str(caught.value)
    assert "plan.json, mismatch.jsonl, steps.jsonl, ledger.json" in message
    assert f"{tmp_path} and {tmp_path / 'fp16_patch'}" in message
    assert "Give the record directory" in message


@pytest.mark.parametrize("name", ["plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json"])
def test_a_missing_file_is_noted_and_the_rest_shown(record: Path, tmp_path: Path, name: str) -> None:
    (record / name).unlink()
    run = load_run(record)

    assert run.notes == [f"{name} is missing"]
    assert run.summary()["steps"] == 3
    assert f"{name} is missing" in page_of({"run": run}, tmp_path)
    assert f"run: {name} is missing" in printed({"run": run})


@pytest.mark.parametrize("name", ["plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json"])
def test_a_single_file_is_a_record(record: Path, tmp_path: Path, name: str) -> None:
    for other in record.iterdir():
        if other.name != name:
            other.unlink()
    run = load_run(record)

    assert len(run.notes) == 3
    assert printed({"run": run})
    assert page_of({"run": run}, tmp_path)


@pytest.mark.parametrize("name", ["mismatch.jsonl", "steps.jsonl"])
def test_a_cut_off_last_line_is_left_out(record: Path, name: str) -> None:
    whole = (record / name).read_text()
    (record / name).write_text(whole[:-30])
    run = load_run(record)

    assert run.notes == [f"{name}: the last line is cut off, and left out"]
    assert len(run.mismatch if name.startswith("mismatch") else run.steps) == 2


def test_a_line_cut_off_by_a_resumed_run_is_left_out(record: Path) -> None:
    with (record / "steps.jsonl").open("a") as lines:
        lines.write('{"step": 4, "ti' + step_line(4) + "\n" + step_line(5) + "\n")
    run = load_run(record)

    assert sorted(run.steps) == [1, 2, 3, 5]
    assert run.notes == ["steps.jsonl: 1 unreadable lines left out"]


def test_of_a_repeated_step_the_last_line_counts(record: Path) -> None:
    with (record / "mismatch.jsonl").open("a") as lines:
        lines.write(mismatch_line(2, 4e-3) + "\n" + mismatch_line(3, 4e-3) + "\n")
    run = load_run(record)

    assert run.total().tokens == 24
    assert run.series("mismatch/mean_abs") == pytest.approx({1: 1e-3, 2: 4e-3, 3: 4e-3})
    assert run.summary()["mismatch"]["mean_abs"] == pytest.approx(3e-3)


def test_a_state_of_another_version_is_noted(record: Path) -> None:
    line = json.loads(mismatch_line(4, 1e-3))
    line["state"]["version"] = 99
    with (record / "mismatch.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    run = load_run(record)

    assert run.total().tokens == 24
    assert "step 4 is not in the totals" in run.notes[0]
    assert "version 99" in run.notes[0]


def test_a_damaged_plan_is_noted(record: Path) -> None:
    (record / "plan.json").write_text('{"mode": "fp')

    assert load_run(record).notes == ["plan.json is not a whole JSON object, and left out"]


def test_roles_are_merged_from_processes_if_need_be(record: Path) -> None:
    rows = [{"roles": {"actor": {"activation": [dtype]}}} for dtype in ("fp16", "torch.bfloat16")]
    (record / "ledger.json").write_text(json.dumps({"processes": rows}))

    assert load_run(record).summary()["ledger"] == {"actor": {"activation": ["bfloat16", "float16"]}}


def test_nonfinite_metrics_are_gaps(record: Path, tmp_path: Path) -> None:
    with (record / "steps.jsonl").open("a") as lines:
        lines.write(
            step_line(4, **{"actor/grad_norm": math.nan}) + "\n" + step_line(5, **{"actor/grad_norm": 0.5}) + "\n"
        )
    run = load_run(record)

    assert run.series("actor/grad_norm") == {5: 0.5}
    assert "nan" not in page_of({"run": run}, tmp_path).lower()


@pytest.mark.parametrize(
    ("quantity", "dtype", "deviates"),
    [
        ("activation", "float16", False),
        ("activation", "float32", True),
        ("engine_weight", "bfloat16", True),
        ("engine_weight", "float32", False),
        ("value", "float32", False),
        ("master", "float32", False),
        ("gradient", "float32", False),
        ("gradient", "bfloat16", True),
        ("wire", "float32", False),
        ("wire", "float16", False),
        ("wire", "bfloat16", True),
        ("logits", "float32", False),
        ("log_prob", "float32", False),
        ("entropy", "float32", False),
    ],
)
def test_what_deviates_from_a_float16_plan(tmp_path: Path, quantity: str, dtype: str, deviates: bool) -> None:
    run = load_run(write_record(tmp_path / "run", ledger={"actor": {quantity: [dtype]}}))

    assert run.deviations() == ([("actor", quantity, [dtype])] if deviates else [])
    assert ('<td class="deviates" title="planned float16">▲' in page_of({"run": run}, tmp_path)) is deviates


def test_the_verdict_names_what_deviates(tmp_path: Path) -> None:
    run = load_run(write_record(tmp_path / "run", ledger={"actor": {"activation": ["float16"], "wire": ["bfloat16"]}}))

    assert "▲ run: planned float16, but saw actor wire in bfloat16." in printed({"run": run})


def test_an_observed_run_is_held_against_itself(tmp_path: Path) -> None:
    mixed = {"actor": {"activation": ["bfloat16"], "master": ["float32"]}, "rollout": {"engine_weight": ["float16"]}}
    runs = {
        "mixed": load_run(write_record(tmp_path / "mixed", dtype=None, ledger=mixed)),
        "uniform": load_run(write_record(tmp_path / "uniform", dtype=None)),
    }
    text = printed(runs)

    assert "▲ mixed: no dtype was planned, and compute was mixed: actor in bfloat16; rollout in float16." in text
    assert "uniform: no dtype was planned; compute was float16 throughout." in text


def test_comparison_has_the_arms_side_by_side(tmp_path: Path) -> None:
    runs = {name: load_run(write_record(tmp_path / name, d)) for name, d in (("bf16", -8e-3), ("fp16", 1e-3))}
    text = printed(runs)

    assert re.search(r"mean \|d\| +│ +8\.00e-3 │ +1\.00e-3 │", text)
    assert re.search(r"mean \|d\| of bf16 ÷ this +│ +1× │ +8×", text)
    assert re.search(r"reward, first → last +│ +0.1 → 0.3 │", text)
    assert re.search(r"loss scale +│ +32\u202f768 │", text)
    assert re.search(r"sampler weights +│ +float16 │", text)
    assert "fp16 has the smallest mismatch: mean |d| is 1.00e-3, 8× less than in bf16." in text


def test_single_run(record: Path) -> None:
    text = printed({"run": load_run(record)})

    assert "run: mean |d| is 1.00e-3 over 24 tokens." in text
    assert "÷" not in text


def test_names_are_not_markup(record: Path, tmp_path: Path) -> None:
    runs = {"[bold]<b>run</b>": load_run(record)}

    assert "<b>run" not in page_of(runs, tmp_path)
    assert "[bold]<b>run</b>: every recorded dtype is as planned, float16." in printed(runs)


def test_page_needs_nothing_else(record: Path, tmp_path: Path) -> None:
    alert = {"name": "k1", "value": 0.2, "threshold": 0.1, "since": 2}
    rewrite(record, 2, stats=uneven_stats(1e-2), noise_floor=stats_of(1e-4).to_dict(), alerts=[alert])
    page = shown({"run": load_run(record), "again": load_run(record)}, tmp_path)

    assert page.open == []
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.seen)
    assert not re.search(r"https?://|@import|url\(", page.own)
    assert "prefers-color-scheme:dark" in page.own


def test_page_shows_the_values(tmp_path: Path) -> None:
    runs = {name: load_run(write_record(tmp_path / name, d)) for name, d in (("bf16", 8e-3), ("fp16", 1e-3))}
    drawn = shown(runs, tmp_path)
    page = drawn.own

    assert "a &lt;title&gt; &amp; more" in page
    assert "fp16 has the smallest mismatch: mean |d| is 1.00e-3, 8× less than in bf16." in page
    assert drawn.points("Mean |d| of a token", "bf16")[2] == pytest.approx(8e-3)
    assert drawn.texts("Loss scale", "fp16")[1] == "skipped at 65\u202f536"
    assert "Below 1e-9, hence not drawn: bf16 0 %, fp16 0 %." in page
    for title in ("Mean |d| of a token", "Spread of |d|", "Mean |Σd|", "Distribution", "Reward", "Loss scale"):
        assert title in page


def test_long_runs_keep_the_page_small(tmp_path: Path) -> None:
    stats, folder = uneven_stats(1e-2), write_record(tmp_path / "run", steps=500)
    line = {"metrics": stats.metrics(), "state": stats.to_dict()}
    lines = (json.dumps({"step": step, **line}) + "\n" for step in range(1, 501))
    (folder / "mismatch.jsonl").write_text("".join(lines))
    page = shown(dict.fromkeys(("bf16", "fp16", "stock"), load_run(folder)), tmp_path)

    assert len(page.own.encode()) < 1_000_000
    assert len(page.whole.encode()) < MOST_BYTES
    assert page.traces("Mean |d| of a token", "bf16")[0]["mode"] == "lines", "too many points for a marker at each"


def test_many_very_long_runs_keep_to_the_limit(tmp_path: Path) -> None:
    names = ("mean_abs", "abs_p50", "abs_p99_9", "seq_mean_abs", "k1", "k3", "ess")
    numbers = torch.rand(2500, len(names), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    mismatch = {
        step: {f"mismatch/{name}": x for name, x in zip(names, row, strict=True)} for step, row in enumerate(numbers)
    }
    run = RunRecord(tmp_path, mismatch=StepMetrics.of(mismatch), stats=uneven_stats(1e-2))
    page = shown({f"run {number}": run for number in range(12)}, tmp_path)

    assert len(page.whole.encode()) < MOST_BYTES


def coverage(tokens: int, ranks: int, **more: Any) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "expected_tokens": 1024,
        "ranks": ranks,
        "expected_ranks": 8,
        "dropped": 0,
        "complete": tokens == 1024,
        **more,
    }


def test_a_step_that_was_measured_in_part_is_noted(record: Path, tmp_path: Path) -> None:
    rewrite(record, 1, coverage=coverage(1024, 8))
    rewrite(record, 2, coverage=coverage(900, 7))
    run = load_run(record)

    assert run.notes == ["step 2: 7 of 8 ranks, 900 of 1024 tokens"]
    assert re.search(r"tokens measured +│ +93.9 %, 1 of 2 steps in part", printed({"run": run}))
    page = shown({"run": run}, tmp_path)
    assert "<li>step 2: 7 of 8 ranks, 900 of 1024 tokens</li>" in page.own
    assert page.points("Coverage", "run")[2] == pytest.approx(0.879, abs=5e-4)


def test_of_many_partial_steps_the_first_are_listed(tmp_path: Path) -> None:
    record = write_record(tmp_path / "run", steps=8)
    for step in range(1, 9):
        rewrite(record, step, coverage=coverage(1, 1, expected_tokens=None, expected_ranks=None, complete=False))
    notes = load_run(record).notes

    assert notes == [*(f"step {step}: 1 ranks, 1 tokens" for step in range(1, 6)), "3 more steps are partly covered"]


def test_whole_coverage_is_no_note_and_no_chart(record: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        rewrite(record, step, coverage=coverage(1024, 8))
    run = load_run(record)

    assert run.notes == []
    assert re.search(r"tokens measured +│ +all │", printed({"run": run}))
    assert "tokens measured / sampled" not in page_of({"run": run}, tmp_path)


def test_alerts_say_since_when_and_whether_they_stand(record: Path, tmp_path: Path) -> None:
    k1 = {"name": "k1", "value": 0.2, "threshold": 0.1, "since": 2}
    rewrite(record, 1, alerts=[{"name": "prob_diff", "value": 0.97, "threshold": 0.95, "since": 1}])
    rewrite(record, 2, alerts=[k1])
    rewrite(record, 3, alerts=[k1 | {"value": 0.3}])
    run = load_run(record)

    assert "▲ run: alerts stand at the last step: k1 since step 2." in printed({"run": run})
    page = page_of({"run": run}, tmp_path)
    assert "<tr><th>prob_diff</th><td>1</td><td>1</td><td>0.97</td><td>0.95</td></tr>" in page
    assert '<tr class="standing"><th>▲ k1</th><td>2</td><td>now</td><td>0.3</td><td>0.1</td></tr>' in page


def test_without_alerts_nothing_is_said_of_them(record: Path, tmp_path: Path) -> None:
    run = load_run(record)

    assert "alert" not in printed({"run": run})
    assert "<h2>Alerts</h2>" not in page_of({"run": run}, tmp_path)


def test_the_gap_is_held_against_the_noise_floor(record: Path, tmp_path: Path) -> None:
    rewrite(record, 1, noise_floor=stats_of(1e-4).to_dict())
    rewrite(record, 3, noise_floor=stats_of(3e-4).to_dict())
    without = load_run(write_record(tmp_path / "without"))
    runs = {"run": load_run(record), "without": without}

    assert re.search(r"mean \|d\| ÷ learner against itself +│ +5× │ +– │", printed(runs))
    floor = shown(runs, tmp_path).traces("Mean |d| of a token", "run")[1]
    assert "learner against learner" in floor["hovertemplate"]
    assert floor["x"] == [1, 2, 3]
    assert floor["y"] == pytest.approx([2e-4] * 3)
    assert "÷ learner against itself" not in printed({"without": without})


def test_the_diagnosis_is_printed_and_on_the_page(record: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        rewrite(record, step, stats=MismatchStats.merge_all([uneven_stats(1e-3)] * 40))
    run = load_run(record)
    console = Console(width=160, record=True, file=io.StringIO())
    print_diagnosis({"run": run}, console)
    text, page = console.export_text(), page_of({"run": run}, tmp_path)

    for finding in diagnose_run(run):
        assert f"run: {cause_text(finding)}" in text
        assert escape(finding.advice) in page
        assert all(escape(sentence) in page for sentence in finding.evidence)


def test_the_page_begins_with_a_sentence_on_each_run(record: Path, tmp_path: Path) -> None:
    same = load_run(write_record(tmp_path / "same", 0.0, steps=20))
    for step in (1, 2, 3):
        rewrite(record, step, stats=MismatchStats.merge_all([uneven_stats(1e-3)] * 40))
    few = load_run(write_record(tmp_path / "few"))
    page = page_of({"run": load_run(record), "same": same, "few": few}, tmp_path)
    said = re.findall(r'<p class="gap">(.*?)</p>', page)

    (cause, *_) = diagnose_run(load_run(record))
    text = cause_text(cause)
    assert said[0].startswith(f"{escape(text[0].upper() + text[1:])}: mean |d| is ")
    assert said[1:] == [
        "Sampler and learner agree exactly.",
        "24 tokens are too few to say what the gap comes from.",
    ]


def test_the_page_begins_with_the_dtype_of_both_sides_or_of_each(tmp_path: Path) -> None:
    ledgers = [
        {"actor": {"activation": ["float16"]}, "rollout": {"engine_weight": [dtype]}}
        for dtype in ("float16", "bfloat16")
    ]
    same, mixed = (
        key_figures(load_run(write_record(tmp_path / str(number), ledger=ledger)))
        for number, ledger in enumerate(ledgers)
    )

    assert same[-1] == ("both in", "float16")
    assert mixed[-2:] == [("actor in", "float16"), ("sampler in", "bfloat16")]


def test_every_cause_has_a_title() -> None:
    assert CAUSES.keys() == {*findings.CAUSES}


def test_distributions_are_drawn_for_each_run(tmp_path: Path) -> None:
    runs = {}
    for name, scale in (("bf16", 1e-2), ("fp16", 1e-3)):
        record = write_record(tmp_path / name)
        rewrite(record, 1, stats=uneven_stats(scale))
        runs[name] = load_run(record)
    drawn = shown(runs, tmp_path)
    page = drawn.own

    for title in ("|d| by probability", "|d| by position", "|Σd| by length"):
        assert f"<h3>{title}</h3>" in page
    assert drawn.points("|d| by position", "bf16")["first"] > 0
    for name in runs:
        assert f'aria-label="{name}: learner&#39;s probability against sampler&#39;s probability"' in page
        assert f'aria-label="{name}: Σd (nats) against sampled tokens"' in page


def test_the_worst_tokens_are_listed_with_their_steps(record: Path, tmp_path: Path) -> None:
    rewrite(record, 2, stats=uneven_stats(1e-3))
    run = load_run(record)
    page = page_of({"run": run}, tmp_path)

    step, token = run.worst[0]
    assert (step, token.sequence, token.position, token.token_id) == (2, 3, 0, 7)
    assert re.search(
        r"<tr><th>2</th><td>3</td><td>0</td><td>7</td><td class=.text.><bdi>–</bdi></td>.*<td>-5</td>", page
    )
    assert "token ids only: for the texts, report with --tokenizer PATH" in page


def test_without_token_ids_a_tokenizer_is_not_asked_for(record: Path, tmp_path: Path) -> None:
    assert "token ids were not recorded" in page_of({"run": load_run(record)}, tmp_path)


def save_tokenizer(folder: Path, texts: dict[int, str]) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {texts.get(number, f"t{number}"): number for number in range(113)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(folder)
    return folder


def test_a_tokenizer_gives_the_texts(record: Path, tmp_path: Path) -> None:
    rewrite(record, 2, stats=uneven_stats(1e-3))
    tokenizer = save_tokenizer(tmp_path / "tokenizer", {7: "<b>\n\u202e x"})
    write_html({"run": load_run(record)}, tmp_path / "page.html", tokenizer=tokenizer)

    assert "<bdi>&lt;b&gt;␊\\u202e␣x</bdi>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_model_of_the_plan_gives_the_texts(record: Path, tmp_path: Path) -> None:
    rewrite(record, 2, stats=uneven_stats(1e-3))
    model = save_tokenizer(tmp_path / "model", {7: "seven"})
    (record / "plan.json").write_text(json.dumps({"mode": "fp16", "dtype": "float16", "model": str(model)}))

    assert "<bdi>seven</bdi>" in page_of({"run": load_run(record)}, tmp_path)


def test_without_a_tokenizer_there_the_ids_are_shown(record: Path, tmp_path: Path) -> None:
    rewrite(record, 2, stats=uneven_stats(1e-3))
    write_html({"run": load_run(record)}, tmp_path / "page.html", tokenizer=tmp_path / "none")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")

    assert f"token ids only: {tmp_path / 'none'}: no such file or directory" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("\t\r\n\0", "␉␍␊␀"),
        ("\x7f\u200b\u202e\ufeff", "\\x7f\\u200b\\u202e\\ufeff"),
        ("\ud800", "\\ud800"),
        ("é漢🙂", "é漢🙂"),
    ],
)
def test_a_token_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_of_a_very_long_run_some_steps_are_kept_and_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "KEPT_STEPS", 4)
    run = load_run(write_record(tmp_path / "run", steps=10))

    assert [*run.step_stats] == [1, 4, 7, 10]
    assert run.total().tokens == 80
    assert len(run.mismatch) == 10


def test_a_record_of_the_first_release_is_shown_without_what_it_lacks(record: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state = {"version": 1, "tokens": 2, "sequences": 1, "d_sum": 0.2, "d_abs_sum": 0.2, "d_square_sum": 0.02}
        state |= {"d_min": 0.1, "d_max": 0.1, "histogram": {"bins": [961], "counts": [2]}}
        rewrite(record, step, state=state, metrics={"mismatch/mean_abs": 0.1})
    run = load_run(record)
    page = page_of({"run": run}, tmp_path)

    assert run.notes == []
    assert "Distribution of |d|" in page
    assert "|d| by probability" not in page
    assert re.search(r"effective sample size +│ +– │", printed({"run": run}))


def test_starts_of_the_trainer_are_counted(record: Path, tmp_path: Path) -> None:
    for step, attempt in ((1, "a"), (2, "a"), (3, "b")):
        rewrite(record, step, attempt=attempt)

    assert "2 starts of the trainer" in page_of({"run": load_run(record)}, tmp_path)
    assert load_run(record).starts == [1, 3]


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_html({}, tmp_path / "page.html")
