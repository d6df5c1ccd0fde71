"""What a probe is given may be damaged: one sentence and exit code 2, before any model is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fp16_patch.cli import main
from fp16_patch.plan.errors import PlanError
from fp16_patch.probe import examining, vllm_sampler
from fp16_patch.probe.prompts import MAX_BLANK_LINES, MAX_LINE_BYTES, PARQUET_ROWS, read_prompts

Written = Callable[[str], Path]


@pytest.fixture
def model(written: Written, tmp_path: Path) -> Path:
    """A copy of a tiny model, to be damaged."""
    return Path(shutil.copytree(written("llama"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(examining, "load_model", load)
    monkeypatch.setattr(vllm_sampler, "sample", load)


def refused(*arguments: object) -> str:
    ended: Result = CliRunner().invoke(main, ["probe", *map(str, arguments)])
    assert ended.exit_code == 2, ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "zzz"), "--device=zzz: torch cannot compute there: "),
        (("--device", "cuda:99"), "--device=cuda:99: torch cannot compute there: "),
        (("--device", "meta"), "--device=meta: torch cannot compute there: "),
        (("--device", ""), "--device=: torch cannot compute there: "),
        (("--seed", "12345678901234567890"), "--seed=12345678901234567890: no seed that every library takes"),
        (("--seed", "-1"), "--seed=-1: no seed"),
        (("--count", "0"), "--count=0: no number of responses"),
        (("--count", "1" + "0" * 18), "no number of responses that can be held. Fix: use a number from 1 to 100000"),
        (("--max-new-tokens", "-5"), "--max-new-tokens=-5: no length of a response"),
        (("--temperature", "nan"), "--temperature=nan: no sampling"),
        (("--temperature", "inf"), "--temperature=inf: no sampling"),
        (("--temperature", "1e-9"), "--temperature=1e-09: no sampling. Fix: use a number from 0.01 to 100"),
        (("--mode", ","), "--mode=: none"),
    ],
)
def test_an_option_is_refused_by_name(model: Path, options: tuple[str, ...], said: str) -> None:
    assert said in refused(model, *options)


def a_terabyte_of_nothing(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(2**40)


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda file: file.write_text("{"), "is no configuration: it is not JSON"),
    "a list": (lambda file: file.write_text("[]"), "is no configuration: it is not an object"),
    "nested": (lambda file: file.write_text("[" * 100_000), "nested more than"),
    "binary": (lambda file: file.write_bytes(b"\xff\xfe\0"), "not UTF-8 text"),
    "large": (a_terabyte_of_nothing, "larger than"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_configuration_that_is_none_is_refused(model: Path, damage: str) -> None:
    spoil, said = CONFIGS[damage]
    spoil(model / "config.json")
    assert said in refused(model, "--device", "cpu")
    assert f"MODEL={model}: its config.json" in refused(model, "--device", "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_type"},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"vocab_size": 0},
        {"vocab_size": -3},
        {"vocab_size": "many"},
        {"vocab_size": None},
        {"vocab_size": 5},
        {"num_attention_heads": 0},
        {"rope_scaling": 5},
    ],
    ids=str,
)
def test_a_configuration_with_a_wrong_value_is_refused(model: Path, changes: dict[str, Any]) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert f"Error: MODEL={model}: " in refused(model, "--device", "cpu")


@pytest.mark.parametrize(
    "content", ["[]", '{"eos_token_id": "end"}', '{"eos_token_id": [[1]]}', '{"eos_token_id": -7}']
)
def test_damaged_generation_settings_are_refused(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    assert f"Error: MODEL={model}: " in refused(model, "--device", "cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 5}'])
def test_a_damaged_tokenizer_is_refused(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    assert f"Error: MODEL={model}: cannot be loaded" in refused(model, "--device", "cpu")


PROMPTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "binary": ("a.txt", lambda file: file.write_bytes(b"1+1=\n\xff\xfe\0\n"), "a.txt:2: not UTF-8 text"),
    "UTF-16": ("a.txt", lambda file: file.write_text("1+1=\n", encoding="utf-16"), "a.txt:1: not UTF-8 text"),
    "a line without end": ("a.txt", a_terabyte_of_nothing, f"a.txt:1: a line of more than {MAX_LINE_BYTES} bytes"),
    "blank lines": ("a.txt", lambda file: file.write_text("\n" * (MAX_BLANK_LINES + 2)), "nothing but blank lines"),
    "nothing": ("a.txt", lambda file: file.write_text("\n \n"), "the file has no prompt"),
    "a pipe": ("a.txt", os.mkfifo, "there is no such file"),
    "a folder": ("a.txt", Path.mkdir, "there is no such file"),
    "nested": ("a.jsonl", lambda file: file.write_text("[" * 100_000), "a.jsonl:1: it is nested more than"),
    "no JSON": ("a.jsonl", lambda file: file.write_text('"1+1="\n{'), "a.jsonl:2: it is not JSON"),
    "a number": ("a.jsonl", lambda file: file.write_text("5"), "a.jsonl:1: no prompt in it"),
    "another key": ("a.jsonl", lambda file: file.write_text('{"a": "b"}'), "a.jsonl:1: no prompt in it"),
    "a number for a prompt": ("a.jsonl", lambda file: file.write_text('{"prompt": 5}'), "neither text nor chat: 5"),
    "a list of texts": ("a.jsonl", lambda file: file.write_text('{"prompt": ["a"]}'), "neither text nor chat: ['a']"),
    "no parquet": ("a.parquet", lambda file: file.write_bytes(b"PAR1" * 9), "not parquet"),
    "an empty parquet": ("a.parquet", Path.touch, "not parquet"),
}


@pytest.mark.parametrize("damage", PROMPTS)
def test_prompts_that_are_none_are_refused(tmp_path: Path, damage: str) -> None:
    name, spoil, said = PROMPTS[damage]
    spoil(tmp_path / name)
    with pytest.raises(PlanError) as caught:
        read_prompts(tmp_path / name, 3, letters)
    assert str(caught.value).startswith(f"--prompts={tmp_path}/")
    assert said in str(caught.value)


def letters(text: str) -> dict[str, list[int]]:
    """Stands for a tokenizer."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_of_a_data_set_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as large:
        large.write(b"\xef\xbb\xbf1\n\n2\r\n")
        large.truncate(2**40)
    assert read_prompts(tmp_path / "large.txt", 2, letters) == [[ord("1")], [ord("2")]]


def test_parquet_is_read_by_the_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": str(row)}], "other": row} for row in range(3 * PARQUET_ROWS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"other": 5}]), tmp_path / "b.parquet")

    class Chats:
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(text)]}

    wanted = [[row] for row in range(2 * PARQUET_ROWS)]
    assert read_prompts(tmp_path / "a.parquet", 2 * PARQUET_ROWS, Chats()) == wanted
    with pytest.raises(PlanError, match="no prompt in it. Fix: name a column one of"):
        read_prompts(tmp_path / "b.parquet", 3, Chats())


def test_a_template_that_takes_no_such_chat_is_named(tmp_path: Path) -> None:
    class Strict:
        chat_template = "…"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise LookupError("roles must alternate")

    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "1"}]}\n')
    with pytest.raises(PlanError, match="the tokenizer does not take them: roles must alternate"):
        read_prompts(tmp_path / "a.jsonl", 1, Strict())


def test_prompts_without_a_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="makes no token of them"):
        read_prompts(None, 1, lambda text: {"input_ids": []})
