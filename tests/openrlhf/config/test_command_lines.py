"""What OpenRLHF's command line is refused for, forced to and told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fp16_patch import Plan, PlanError

pytest.importorskip("torch")

# What these tests give of the command lines up to 0.10.1, which have no sections.
WITHOUT_SECTIONS = {"pretrain"}


@pytest.fixture(autouse=True)
def no_plan_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP16_PATCH", "off")


def parsed(*flags: str) -> Any:
    """Arguments with these flags alone, of releases with sections and without; one without a value is True."""
    given: dict[str, Any] = {}
    for word in flags:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            given[name] = value or True
        else:
            given[name] = word
    root = (
        SimpleNamespace() if any(name in WITHOUT_SECTIONS for name in given) else SimpleNamespace(ds=SimpleNamespace())
    )
    for name, value in given.items():
        *path, last = name.split(".")
        space = root
        for part in path:
            if not hasattr(space, part):
                setattr(space, part, SimpleNamespace())
            space = getattr(space, part)
        setattr(space, last, value)
    return root


def refused(*flags: str, **plan: Any) -> str:
    from fp16_patch.openrlhf.config.arguments import check

    with pytest.raises(PlanError) as refusal:
        check(parsed(*flags), Plan(**plan))
    return str(refusal.value)


def test_four_bit_weights_are_refused_with_the_flag() -> None:
    assert refused("--ds.load_in_4bit").startswith(
        "--ds.load_in_4bit=True: OpenRLHF computes 4-bit weights in bfloat16"
    )


def test_deepspeeds_tensor_parallelism_is_refused() -> None:
    assert "use 1" in refused("--ds.tensor_parallel_size", "2")


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (("--actor.optim", "muon"), "use adam"),
        (("--optim", "muon"), "use adam"),
        (("--ds.adam_offload",), "use --ds.zero_stage 3"),
        (("--ds.zero_stage", "1"), "use 2 or 3"),
        (("--ds.deepcompile",), "not in FP32. Fix: leave it out"),
        (("--pretrain", "model", "--deepcompile"), "--deepcompile=True: "),
        (("--ds.lora.rank", "8", "--ds.zero_stage", "3"), "use --ds.zero_stage 2"),
    ],
    ids=str,
)
def test_what_deepspeed_spoils_under_a_loss_scale_is_refused(flags: tuple[str, ...], fix: str) -> None:
    assert fix in refused(*flags)


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family that the installed vLLM refuses in float16."""
    from fp16_patch.vllm import stored_models

    monkeypatch.setattr(stored_models, "refused_in_float16", lambda sources: frozenset({"hot"}))
    return "hot"


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_that_vllm_refuses_in_float16_is_refused_before_it_is_loaded(
    nested: bool, hot: str, tmp_path: Path
) -> None:
    family = hot
    stored = {"model_type": "seeing", "text_config": {"model_type": hot}} if nested else {"model_type": hot}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    said = refused("--actor.model_name_or_path", str(tmp_path))
    assert f"vLLM refuses models of type {family}" in said
    assert "FP16_PATCH=bf16" in said


@pytest.mark.parametrize(
    "stored",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_model_stored_quantized_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert "stored quantized (gptq)" in refused("--reward.model_name_or_path", str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ({"init_scale": 60000.0}, "power of two"),
        ({"min_scale": 0.5}, "whole number"),
        ({"growth_factor": 3.0}, "doubles"),
        ({"backoff_factor": 0.25}, "halves"),
    ],
    ids=str,
)
def test_scaler_settings_that_deepspeed_lacks_are_refused_as_they_are_set(setting: dict[str, float], fix: str) -> None:
    said = refused(**setting)
    assert fix in said
    ((name, value),) = setting.items()
    assert said.startswith(f"FP16_PATCH_{name.upper()}={value}: ")


def test_openrlhf_has_no_fp32() -> None:
    assert "use bf16, fp16 or observe" in refused(mode="fp32")


def test_the_bf16_arm_needs_nothing_of_a_scaler(hot: str, tmp_path: Path) -> None:
    from fp16_patch.openrlhf.config.arguments import check

    (tmp_path / "config.json").write_text(json.dumps({"model_type": hot}))
    check(parsed("--actor.model_name_or_path", str(tmp_path)), Plan(mode="bf16", init_scale=60000.0))


def test_dtype_and_accumulation_are_forced_and_named() -> None:
    from fp16_patch.openrlhf.config.arguments import apply_to

    args = parsed("--ds.param_dtype", "bf16")
    assert apply_to(args, Plan()) == ["--ds.param_dtype: bf16 → fp16", "--ds.grad_accum_dtype: None → fp32"]
    assert (args.ds.param_dtype, args.ds.grad_accum_dtype) == ("fp16", "fp32")
    assert apply_to(args, Plan()) == []


def test_a_command_line_without_sections_is_read_and_forced_and_named_as_it_is_typed() -> None:
    from fp16_patch.openrlhf.config.arguments import apply_to, effective_dtypes

    said = refused("--pretrain", "model", "--load_in_4bit", "--adam_offload", "--zero_stage", "2")
    assert "--load_in_4bit=True: OpenRLHF computes 4-bit weights in bfloat16" in said
    assert "--adam_offload=True" in said
    assert "use --zero_stage 3" in said
    args = parsed("--pretrain", "model", "--param_dtype", "bf16", "--remote_rm_url=reward.py")
    assert apply_to(args, Plan()) == ["--param_dtype: bf16 → fp16", "--grad_accum_dtype: None → fp32"]
    assert (args.param_dtype, args.grad_accum_dtype) == ("fp16", "fp32")
    assert effective_dtypes(args, Plan(mode="observe")).keys() == {"actor", "ref", "critic", "rollout"}


@pytest.mark.parametrize(("mode", "said"), [("fp16", ["--bf16: True → fp16"]), ("bf16", [])])
def test_where_there_is_only_a_bf16_switch_it_is_on_and_means_the_plans_dtype(mode: str, said: list[str]) -> None:
    from fp16_patch.openrlhf.config.arguments import apply_to

    args = parsed("--pretrain", "model", "--bf16", "--grad_accum_dtype", "fp32")
    assert apply_to(args, Plan(mode=mode)) == said
    args.bf16 = False
    assert apply_to(args, Plan(mode=mode)) == [f"--bf16: False → {mode}"]
    assert args.bf16 is True


@pytest.mark.parametrize("engines", ["1", None])
def test_a_model_that_vllm_refuses_is_refused_where_it_is_sampled_from(
    engines: str | None, hot: str, tmp_path: Path
) -> None:
    from fp16_patch.openrlhf.config.arguments import conflicts_of

    (tmp_path / "config.json").write_text(json.dumps({"model_type": hot}))
    sampled = ("--vllm_num_engines", engines) if engines else ()
    assert len(list(conflicts_of(parsed("--pretrain", str(tmp_path), *sampled), Plan()))) == bool(engines)


def test_roles_with_and_without_the_plan() -> None:
    from fp16_patch.openrlhf.config.arguments import effective_dtypes

    args = parsed("--ds.param_dtype", "fp16", "--reward.remote_url=reward.py")
    # OpenRLHF's own switch reaches the learner and not the engine.
    stock = {"actor": "float16", "ref": "float16", "critic": "float16", "rollout": "bfloat16"}
    assert effective_dtypes(args, Plan(mode="observe")) == stock
    assert set(effective_dtypes(args, Plan()).values()) == {"float16"}


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "half"}}, "float16"),
        ({"model_type": "qwen2"}, "as stored"),
    ],
)
def test_without_its_bf16_switch_openrlhf_trains_in_what_each_model_is_stored_in(
    stored: dict[str, Any], computed: str, tmp_path: Path
) -> None:
    from fp16_patch.openrlhf.config.arguments import effective_dtypes

    (tmp_path / "config.json").write_text(json.dumps(stored))
    args = parsed("--pretrain", "of-a-hub", "--critic_pretrain", str(tmp_path), "--advantage_estimator", "gae")
    args.bf16 = False
    roles = effective_dtypes(args, Plan(mode="observe"))
    assert (roles["actor"], roles["critic"], roles["rollout"]) == ("as stored", computed, "bfloat16")
    args.bf16 = True
    assert set(effective_dtypes(args, Plan(mode="observe")).values()) == {"bfloat16"}


def test_experts_that_will_be_slow_are_named_with_their_flag(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from fp16_patch.openrlhf.config.arguments import slow_paths_of

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (said,) = slow_paths_of(parsed("--actor.model_name_or_path", str(tmp_path)), Plan())
    assert said.startswith("--actor.model_name_or_path: the learner computes the experts of qwen3_moe")
