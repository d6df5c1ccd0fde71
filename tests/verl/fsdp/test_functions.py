"""Single functions of verl, stock and under a plan, in one process."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.verl

torch = pytest.importorskip("torch")

from tests.live_bytes import LiveBytes


def scaled(logits: Any, temperature: float) -> Any:
    from verl.workers.engine.fsdp import transformer_impl

    return transformer_impl._scale_logits_by_temperature(
        logits, torch.tensor([[temperature]]), is_unit_temperature=temperature == 1.0
    )


def test_stock_divides_by_zero_at_temperature_zero_in_float16() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float16)
    assert not scaled(logits, 0.0).isfinite().all()


def test_temperature_is_applied_in_float32(activated: Callable[..., Any]) -> None:
    activated()
    logits = torch.tensor([[40.0, 0.0, 13.0]], dtype=torch.float16)
    exact = logits.float() / 0.7
    assert torch.equal(scaled(logits, 0.7), exact)
    assert not torch.equal((logits / torch.tensor(0.7).half()).float(), exact)
    assert scaled(logits, 0.0).isfinite().all()
    assert scaled(logits, 1.0).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_through_the_temperature_is_divided_in_float32_and_rounded_once(
    activated: Callable[..., Any], dtype: Any
) -> None:
    activated()
    logits = torch.randn(7, 33, dtype=dtype, requires_grad=True)
    weights = torch.randn(7, 33)
    (scaled(logits, 0.7) * weights).sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad, (weights / torch.tensor(0.7)).to(dtype))


def test_the_backward_pass_through_the_temperature_makes_one_tensor_in_half(activated: Callable[..., Any]) -> None:
    activated()
    logits = torch.randn(64, 1024, dtype=torch.float16, requires_grad=True)
    quotient, gradient = scaled(logits, 0.7), torch.randn(64, 1024)
    with LiveBytes() as live:
        torch.autograd.grad(quotient, logits, gradient)
    assert live.peak == 2 * logits.numel()


def test_log_probs_and_entropy_come_out_in_float32(activated: Callable[..., Any]) -> None:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    activated()
    logits = scaled(torch.randn(5, 11, dtype=torch.float16), 0.7)
    assert logprobs_from_logits(logits, torch.arange(5)).dtype == torch.float32
    assert entropy_from_logits(logits).dtype == torch.float32


class CastingEngine:
    """Takes what verl's mooncake and kimi engines take."""

    def __init__(self, bucket_size: int, rollout_dtype: Any = torch.bfloat16) -> None:
        self.bucket_size, self.rollout_dtype = bucket_size, rollout_dtype


class VerbatimEngine:
    """Takes no dtype, as verl's colocated engine."""

    def __init__(self, bucket_size: int) -> None:
        self.bucket_size = bucket_size


@pytest.fixture
def new_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    engines = {"casting": CastingEngine, "verbatim": VerbatimEngine}
    monkeypatch.setattr(CheckpointEngineRegistry, "_registry", engines)
    return lambda name: CheckpointEngineRegistry.new(name, bucket_size=8)


def test_stock_checkpoint_engines_cast_to_bfloat16(new_engine: Callable[[str], Any]) -> None:
    assert new_engine("casting").rollout_dtype == torch.bfloat16


def test_checkpoint_engines_cast_to_the_plans_dtype(
    activated: Callable[..., Any], new_engine: Callable[[str], Any]
) -> None:
    activated()
    assert new_engine("casting").rollout_dtype == torch.float16
    assert new_engine("verbatim").bucket_size == 8


@pytest.mark.parametrize("module", ["kimi", "mooncake"])
def test_verls_casting_engines_take_the_argument(module: str) -> None:
    from fp16_patch.patching.sources import installed_file

    path = installed_file(f"verl.checkpoint_engine.{module}_checkpoint_engine")
    assert path is not None
    tree = ast.parse(path.read_text())
    inits = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    arguments = {argument.arg for init in inits for argument in (*init.args.args, *init.args.kwonlyargs)}
    assert "rollout_dtype" in arguments


def sent(weights: dict[str, Any], adapter: Any = None, quantizes: bool = False, syncs: int = 2) -> dict[str, str]:
    """The dtypes of the last of some syncs for a sampler that keeps `gate.weight`, without verl's own part."""
    from types import SimpleNamespace

    from fp16_patch.runtime.preflight import allow_training
    from fp16_patch.verl.fsdp.weight_sync import per_tensor_param

    allow_training(None, sampler_keeps={"parameters": ["gate.weight"], "buffers": []})
    model, settings = SimpleNamespace(model_type="language_model"), SimpleNamespace(forward_only=False)
    engine = SimpleNamespace(module=None, model_config=model, engine_config=settings, rank=0, _qat_enabled=quantizes)
    for _ in range(syncs):
        iterator, _ = per_tensor_param(lambda: (iter(weights.items()), adapter), engine, (), {})
        dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in iterator}
    return dtypes


WEIGHTS = {"mlp.gate.weight": torch.ones(2), "mlp.up_proj.weight": torch.ones(2), "odd.bias": torch.ones(3)}
AS_THEY_ARE = dict.fromkeys(WEIGHTS, "float32")


@pytest.mark.parametrize(("mode", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_what_a_sampler_does_not_keep_is_sent_in_the_plans_dtype(
    activated: Callable[..., Any], mode: str, dtype: str
) -> None:
    activated(mode=mode)
    # An FP32 weight behind three halves would lie askew in the buckets that verl sends.
    assert sent(WEIGHTS) == {**AS_THEY_ARE, "mlp.up_proj.weight": dtype}


def test_before_it_is_known_what_is_sent_weights_go_as_they_are(activated: Callable[..., Any]) -> None:
    activated()
    assert sent(WEIGHTS, syncs=1) == AS_THEY_ARE


def test_adapters_quantized_weights_and_observed_runs_are_left_alone(activated: Callable[..., Any]) -> None:
    import fp16_patch

    activated()
    assert sent(WEIGHTS, adapter={"r": 4}) == sent(WEIGHTS, quantizes=True) == AS_THEY_ARE
    fp16_patch.deactivate()
    activated(mode="observe")
    assert sent(WEIGHTS) == AS_THEY_ARE


def test_weights_of_other_dtypes_are_sent_as_they_are(activated: Callable[..., Any]) -> None:
    activated()
    others = {"mlp.gate.weight": torch.ones(2), "map": torch.ones(2, dtype=torch.int64), "b": torch.ones(2).bfloat16()}
    assert sent(others) == {"mlp.gate.weight": "float32", "map": "int64", "b": "bfloat16"}


def test_weights_that_samplers_keep_but_nobody_sends_hold_all_back_and_are_named(
    activated: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    activated()
    monkeypatch.setattr(logging.getLogger("fp16_patch"), "propagate", True)
    with caplog.at_level("INFO"):
        assert sent({"mlp.up_proj.weight": torch.ones(2)}, syncs=4) == {"mlp.up_proj.weight": "float32"}
    assert caplog.text.count("in FP32: it keeps gate.weight in another dtype, and no weight is called so") == 1


def test_an_exported_weight_outside_the_range_stays_whole_and_is_named(
    activated: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from fp16_patch.verl.fsdp.export import in_plan_dtype

    activated()
    exported = in_plan_dtype({"lm_head": torch.tensor([7e4]), "norm": torch.tensor([1.0])})
    assert exported["lm_head"].item() == 7e4
    assert exported["norm"].dtype == torch.float16
    assert "lm_head holds 70000, out of torch.float16's range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "children"),
    [
        ({"tensor_parallel_size": 2}, {"engine_core": 1, "sampler_worker": 2}),
        (
            {"tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 4},
            {"engine_core": 4, "sampler_worker": 8},
        ),
        ({"tensor_parallel_size": 16, "nnodes": 2, "node_rank": 0}, {"engine_core": 1, "sampler_worker": 8}),
        ({"tensor_parallel_size": 16, "nnodes": 2, "node_rank": 1}, {"engine_core": 0, "sampler_worker": 8}),
    ],
)
def test_a_server_knows_how_many_children_must_attest(
    activated: Callable[..., Any], arguments: dict[str, int], children: dict[str, int]
) -> None:
    activated()
    from fp16_patch.verl.samplers.vllm import _children_of

    assert _children_of(arguments) == children
