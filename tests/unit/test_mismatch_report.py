"""Reading run records, whole and damaged, and what the comparison and the page say about them."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fp16_patch.mismatch.chart import Axis, decade_axis, linear_axis, octave_axis
from fp16_patch.mismatch.comparison import print_comparison
from fp16_patch.mismatch.page import write_html
from fp16_patch.mismatch.record import RunRecord, load_run
from fp16_patch.mismatch.stats import MismatchStats

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


def page_of(runs: dict[str, RunRecord], tmp_path: Path) -> str:
    write_html(runs, tmp_path / "page.html", "a <title> & more")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


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


class Elements(HTMLParser):
    """The tags that are open at the end, and every (tag, attributes) on the way."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_else(record: Path, tmp_path: Path) -> None:
    page = page_of({"run": load_run(record)}, tmp_path)
    elements = Elements(page)

    assert elements.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements.seen}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.seen)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page


def test_page_shows_the_values(tmp_path: Path) -> None:
    runs = {name: load_run(write_record(tmp_path / name, d)) for name, d in (("bf16", 8e-3), ("fp16", 1e-3))}
    page = page_of(runs, tmp_path)

    assert "a &lt;title&gt; &amp; more" in page
    assert "fp16 has the smallest mismatch: mean |d| is 1.00e-3, 8× less than in bf16." in page
    assert "<title>bf16, step 2: 8.00e-3</title>" in page
    assert "<title>fp16, step 1: skipped at 65\u202f536</title>" in page
    assert "Below 1e-9, hence not drawn: bf16 0 %, fp16 0 %." in page
    for title in ("Mean |d| of a token", "Spread of |d|", "Mean |Σd|", "Distribution", "Reward", "Loss scale"):
        assert title in page


def test_a_long_run_keeps_the_page_small(tmp_path: Path) -> None:
    page = page_of({"run": load_run(write_record(tmp_path / "run", steps=1000))}, tmp_path)

    assert len(page) < 1_000_000
    assert '<g class="mark quiet s0">' in page


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_html({}, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (linear_axis("", [0.0, 1.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (linear_axis("", [-3e-4, 4e-4]), ["-4e-4", "-2e-4", "0", "2e-4", "4e-4"]),
        (linear_axis("step", [1.0, 10.0], snug=True, whole=True), ["2", "4", "6", "8", "10"]),
        (linear_axis("step", [7.0], snug=True, whole=True), ["7"]),
        (decade_axis("", [1e-3, 1e-3]), ["10⁻³", "2·10⁻³"]),
        (decade_axis("", [8.8e-4, 7.1e-3]), ["5·10⁻⁴", "10⁻³", "2·10⁻³", "5·10⁻³", "10⁻²"]),
        (decade_axis("", [0.0, 3e-7, 2e-2]), ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]),
        (octave_axis("", [65536.0]), ["2¹⁵", "2¹⁶", "2¹⁷"]),
    ],
)
def test_ticks(axis: Axis, texts: list[str]) -> None:
    assert [axis.tick_text(tick) for tick in axis.ticks] == texts
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)
