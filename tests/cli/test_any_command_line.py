"""Whatever is typed, and whatever lies there, a command ends in a sentence: no traceback, nothing for a terminal to act
on."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp16_patch.cli import main
from fp16_patch.patching.declarations import declared_patches

ESCAPES = "\x1b]0;title\x07\x1b[2J\u202e[/b]"
CONTENTS = {
    "nothing": b"",
    "half.json": b'{"version": 1, ',
    "list.json": b"[]",
    "binary.jsonl": bytes(range(256)),
    "nested.txt": b"[" * 100_000,
    f"run[lr=1e-6]{ESCAPES.replace('/', '|')}.json": b"{}",
    "model/config.json": b'["\xff"]',
    "other model/config.json": b"{" * 1000,
    "syntax/verl/__init__.py": b"def f(:",
    "fork/src/openrlhf/models/utils.py": "# größer\n".encode("latin-1"),
    "run/fp16_patch/steps.jsonl": b"",
    "run/fp16_patch/plan.json": b"{}",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of odd files, in which the commands are typed."""
    folder, before = tmp_path_factory.mktemp("here"), Path.cwd()
    # A module that each tree's patches look for, damaged in each of the ways.
    target = declared_patches()[0].variants[0].module.replace(".", "/")
    damaged = {f"{tree}/{target}.py": CONTENTS[tree] for tree in ("nested.txt", "half.json", "binary.jsonl")}
    for name, content in {**CONTENTS, **{f"tree of {name}": content for name, content in damaged.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with (folder / "sparse.json").open("wb") as sparse:
        sparse.truncate(2**40)
    os.chdir(folder)
    yield folder
    os.chdir(before)


ODD_PLACES = ["pipe", "loop", "sparse.json", "/dev/zero", "/dev/full", "/proc/no", "~nobody/x", "n" * 5000, ".", "-"]
TREES = [f"tree of {name}" for name in ("nested.txt", "half.json", "binary.jsonl")]
PLACES = [*ODD_PLACES, *TREES, *CONTENTS, *(str(Path(name).parent) for name in CONTENTS), "syntax", "fork"]
TEXTS = [ESCAPES, "", "nan", "-1", "1" * 20, "a=b", "fp16", "a\0b"]

texts = st.text(st.characters(), max_size=8) | st.sampled_from(TEXTS)
places = st.sampled_from(PLACES) | texts
values = places | texts
Line = list[str]


def given_once(*options: str) -> st.SearchStrategy[Line]:
    """Some of these options, each with any value, or with none where it takes none."""
    chosen = st.lists(st.sampled_from(options), unique=True, max_size=3)
    return chosen.flatmap(lambda names: st.tuples(*(st.tuples(st.just(name), values) for name in names))).map(
        lambda pairs: [f"{name}={value}" if name[-1] != "!" else name[:-1] for name, value in pairs]
    )


def command(*words: str, options: tuple[str, ...], tail: st.SearchStrategy[str] = values) -> st.SearchStrategy[Line]:
    behind = st.lists(tail, max_size=2)
    return st.tuples(given_once(*options), behind).map(lambda parts: [*words, *parts[0], "--", *parts[1]])


# Without what starts something, asks the network, or imports a framework.
FOUND_NOWHERE = texts.filter(lambda text: not text.strip().lower().startswith(("verl", "vllm", "openrlhf")))
COMMANDS = st.one_of(
    command("report", options=("--html", "--tokenizer")),
    command("watch", "--once", options=("--every", "--nothing")),
    command("settings", options=("--mode", "--verbose!", "--json!"), tail=texts),
    command(
        "probe", options=("--prompts", "--count", "--seed", "--temperature", "--mode", "--device", "--json", "--html")
    ),
    command("diff", options=("--source", "--mode", "--output")),
    places.map(lambda place: ["diff", "--source", place]),
    places.map(lambda place: ["doctor", "--source", place]),
    FOUND_NOWHERE.map(lambda text: ["matrix", "--check", text]),
    st.tuples(places, places).map(lambda pair: ["analyze", pair[0], "--output", pair[1], "--html", "/proc/no/page"]),
    st.lists(texts, max_size=3).map(lambda words: ["run", "--mode", "fp8", *words]),
    st.lists(texts, min_size=1, max_size=3),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[*HealthCheck])
@given(COMMANDS, st.none() | places)
def test_any_command_line_ends_in_a_sentence(here: Path, arguments: list[str], probe: str | None) -> None:
    env = {"COLUMNS": "200", "FP16_PATCH_PROBE": probe and probe.replace("\0", "")}
    ended = CliRunner().invoke(main, arguments, env=env, color=True)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), arguments
    assert ended.exit_code in (0, 1, 2)
    assert {character for character in ended.output if unicodedata.category(character) in ("Cc", "Cf", "Cs")} <= {"\n"}
    assert ended.exit_code != 2 or "Error: " in ended.output
