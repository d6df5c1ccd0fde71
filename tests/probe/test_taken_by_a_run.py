"""From the command to the run that takes its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from fp16_patch import Plan
from fp16_patch.cli import main
from fp16_patch.plan.errors import PlanError
from fp16_patch.plan.probe_settings import conflict_with
from fp16_patch.probe.result import ProbeResult
from tests.mismatch.report.pages import Page

Probe = Callable[..., ProbeResult]


@pytest.fixture
def written_result(probed: Probe, tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        path = tmp_path / f"{name}.json"
        probed(name).write(path)
        return path

    return write


def test_a_plan_starts_at_the_scale_that_was_measured(written_result: Callable[[str], Path]) -> None:
    path = written_result("llama")
    measured = json.loads(path.read_text())["recommendation"]["init_scale"]
    plan = Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(path)})
    assert plan.init_scale == measured != Plan().init_scale
    assert plan.probe == str(path)


def test_a_scale_that_is_given_goes_before(written_result: Callable[[str], Path]) -> None:
    environment = {"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(written_result("llama")), "FP16_PATCH_INIT_SCALE": "64"}
    plan = Plan.from_environment(environment)
    assert plan.init_scale == 64
    assert Plan.from_settings({"ledger_every": 7}, "fp16_patch", base=plan).init_scale == 64


def test_processes_of_a_run_do_not_need_the_file(written_result: Callable[[str], Path]) -> None:
    path = written_result("llama")
    plan = Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(path)})
    path.unlink()
    assert Plan.from_environment({"FP16_PATCH_PLAN": plan.to_json()}) == plan


@pytest.mark.parametrize(
    ("name", "said"),
    [("residual", "unsafe in fp16"), ("attention_scores", "model.layers.2.self_attn would have to stay in FP32")],
)
def test_an_unsafe_model_is_refused(written_result: Callable[[str], Path], name: str, said: str) -> None:
    environment = {"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(written_result(name))}
    with pytest.raises(PlanError, match=said) as refused:
        Plan.from_environment(environment)
    assert "FP16_PATCH=bf16" in str(refused.value)
    assert Plan.from_environment({**environment, "FP16_PATCH": "bf16"}).dtype == "bfloat16"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 99}'])
def test_what_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "probe.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=str(path)):
        Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(path)})


def test_a_result_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="fp16-patch probe MODEL --json FILE"):
        Plan.from_environment({"FP16_PATCH": "1", "FP16_PATCH_PROBE": str(tmp_path / "none.json")})


def test_the_probe_of_another_model_is_noticed(
    written: Callable[[str], Path], written_result: Callable[[str], Path]
) -> None:
    path = str(written_result("llama"))
    assert conflict_with(path, "model.path", written("llama")) is None
    assert conflict_with(path, "model.path", "some-org/on-a-hub") is None
    assert conflict_with(None, "model.path", written("qwen2")) is None
    conflict = conflict_with(path, "model.path", written("qwen2"))
    assert conflict is not None
    assert "the probe of another model" in str(conflict)


@pytest.mark.openrlhf
def test_openrlhf_refuses_the_probe_of_another_model(
    written: Callable[[str], Path], written_result: Callable[[str], Path]
) -> None:
    pytest.importorskip("openrlhf")
    from fp16_patch.openrlhf.config.arguments import conflicts_of

    plan = Plan(probe=str(written_result("llama")))
    for model, refused in (("llama", False), ("qwen2", True)):
        args = SimpleNamespace(actor=SimpleNamespace(model_name_or_path=str(written(model))), ds=SimpleNamespace())
        assert any("another model" in str(conflict) for conflict in conflicts_of(args, plan)) == refused


@pytest.mark.verl
def test_verl_refuses_the_probe_of_another_model(
    written: Callable[[str], Path], written_result: Callable[[str], Path]
) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    pytest.importorskip("verl")
    from fp16_patch.verl.config.settings import _model_conflicts

    plan = Plan(probe=str(written_result("llama")))
    for model, refused in (("llama", False), ("qwen2", True)):
        config = omegaconf.OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(written(model))}}})
        found = [conflict for conflict in _model_conflicts(config, plan) if "another model" in str(conflict)]
        assert bool(found) == refused


def run(*arguments: Any) -> Any:
    quick = ("--sampler", "hf", "--count", "2", "--max-new-tokens", "6", "--device", "cpu")
    return CliRunner().invoke(main, ["probe", *map(str, arguments), *quick])


def test_the_command_writes_what_it_says(written: Callable[[str], Path], tmp_path: Path) -> None:
    outputs = {kind: tmp_path / f"probe.{kind}" for kind in ("json", "html")}
    result = run(written("llama"), "--json", outputs["json"], "--html", outputs["html"])
    assert result.exit_code == 0, result.output
    assert "recommended: fp16" in result.output
    assert "fp16/fp16" in result.output
    page = Page.read(outputs["html"])
    assert len(page.figures) >= 6
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.seen)
    assert json.loads(outputs["json"].read_text())["recommendation"]["precision"] == "fp16"


def test_an_unsafe_model_ends_it_with_1(written: Callable[[str], Path]) -> None:
    result = run(written("residual"), "--dtypes", "fp32")
    assert result.exit_code == 1
    assert "recommended: bf16" in result.output
    assert "model.layers.1.mlp.down_proj" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/model",), "MODEL=no/such/model: no config.json there"),
        (("MODEL", "--mode", "fp8"), "--mode=['fp8']: no such dtype"),
        # As it was called before.
        (("MODEL", "--dtypes", "fp8"), "--mode=['fp8']: no such dtype"),
        (("MODEL", "--prompts", "no.txt"), "--prompts=no.txt: there is no such file"),
        (("MODEL", "--temperature", "0"), "--temperature=0.0: no sampling"),
    ],
)
def test_bad_input_is_named(written: Callable[[str], Path], arguments: tuple[str, ...], said: str) -> None:
    result = run(*(str(written("llama")) if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "1+1=\n\n2+2=\n"),
        ("prompts.jsonl", '{"prompt": "1+1="}\n{"input": "2+2=", "label": 4}\n'),
        ("chats.jsonl", '{"messages": [{"role": "user", "content": "1+1="}]}\n"2+2="\n'),
    ],
)
def test_prompts_are_read_as_data_sets_have_them(
    written: Callable[[str], Path], tmp_path: Path, name: str, content: str
) -> None:
    from transformers import AutoTokenizer

    from fp16_patch.probe.prompts import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(written("llama"))
    (tmp_path / name).write_text(content)
    prompts = read_prompts(tmp_path / name, 3, tokenizer)
    assert [tokenizer.decode(ids) for ids in prompts] == ["1+1=", "2+2=", "1+1="]
