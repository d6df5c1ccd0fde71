"""What runs are called: the experiment's name, and no two alike."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from fp16_patch.mismatch.report.labels import labelled


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        # verl's record lies in its checkpoints' folder, whose name is the same in every run.
        (["out/demo/bf16/checkpoints", "out/demo/fp16/checkpoints"], ["bf16", "fp16"]),
        (["checkpoints/my_project/my_run", "runs/other/fp16_patch"], ["my_run", "other"]),
        (["out/bf16/checkpoints/fp16_patch"], ["bf16"]),
        (["bf16.jsonl", "fp16.jsonl.gz"], ["bf16.jsonl", "fp16.jsonl.gz"]),
    ],
)
def test_a_run_is_called_by_its_experiment(paths: list[str], labels: list[str]) -> None:
    assert labelled([Path(path) for path in paths]) == {
        label: Path(path) for label, path in zip(labels, paths, strict=True)
    }


def test_runs_of_the_same_name_stay_apart() -> None:
    paths = (Path("a/checkpoints"), Path("b/checkpoints"), Path("c"))
    assert list(labelled(paths)) == ["a", "b", "c"]
    deep = (Path("out/a/run/checkpoints"), Path("out/b/run/checkpoints"), Path("out/c"))
    assert list(labelled(deep)) == ["a/run", "b/run", "c"]


def test_brackets_and_links_that_lead_nowhere_are_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert list(labelled([tmp_path / "grpo[a]", tmp_path / "grpo[b]", tmp_path / "loop"])) == [
        "grpo[a]",
        "grpo[b]",
        "loop",
    ]
