"""By contract: verl's own Megatron code, stock and under a plan, between stand-ins for what Megatron does."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

pytestmark = pytest.mark.verl

torch = pytest.importorskip("torch")

from fp16_patch.patching.declarations import Status, declared_patches, installed_release
from fp16_patch.patching.sources import Installed
from fp16_patch.plan.plan import Plan
from fp16_patch.scaling.scaler import StepOutcome
from integration.cpu import megatron_stand_in
from tests.verl.megatron import megatron_parts as parts

PATCHES = {patch.name: patch for patch in declared_patches() if patch.name.startswith("megatron-")}
Activate = Callable[..., Any]
BOTH = pytest.mark.parametrize("provides", [False, True], ids=["mbridge", "megatron-bridge"])


@pytest.fixture(autouse=True, scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    with megatron_stand_in.installed():
        import_module("megatron.core.utils").get_model_config = lambda chunk: chunk.config  # type: ignore[attr-defined]
        yield
    torch.distributed.destroy_process_group()


def module_of(name: str) -> Any:
    """The module a patch is for in the installed release; the test is for none without."""
    verdict = PATCHES[name].verify()
    if verdict.status is Status.EXEMPT:
        pytest.skip(str(verdict))
    return import_module(verdict.variant.module)


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that makes verl's engine around the stand-ins, with the gradients it is to see."""

    def engine(*gradients: float) -> Any:
        implementation = module_of("megatron-engine-overflow")
        monkeypatch.setattr(implementation, "mpu", parts.Ranks())
        chunk, left = parts.Chunk(), list(gradients)
        made = implementation.MegatronEngine.__new__(implementation.MegatronEngine)
        made.module, made.optimizer, made.is_value_model = [chunk], parts.Optimizer(chunk), False
        made.engine_config = SimpleNamespace(forward_only=False, dynamic_context_parallel=False)
        made.model_config = SimpleNamespace(model_type="language_model")

        def forward_backward_batch(*_: Any, **__: Any) -> dict[str, Any]:
            chunk.backward(left.pop(0), made.optimizer)
            return {"metrics": {}}

        made.forward_backward_batch = forward_backward_batch
        return made

    return engine


def fill(engine: Any, gradient: float) -> None:
    """Give every parameter a gradient, unscaled so much, in the FP32 buffers in which ranks' gradients add up."""
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for parameter in optimizer.parameters:
            parameter.main_grad.fill_(gradient * optimizer.grad_scaler.scale.item())


def experts(engine: Any) -> None:
    """Put a chained optimizer into an engine: the dense parameters' and the experts'."""
    engine.optimizer = parts.Chained(engine.optimizer, parts.Optimizer(parts.Chunk()))


def masters_of(engine: Any) -> list[torch.Tensor]:
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    return [master.clone() for optimizer in optimizers for master in optimizer.masters]


@pytest.mark.parametrize("chained", [False, True], ids=["one", "chained"])
def test_megatron_takes_a_step_of_finite_gradients_whose_norm_is_not(
    make_engine: Callable[..., Any], chained: bool
) -> None:
    engine = make_engine()
    if chained:
        experts(engine)
    before = masters_of(engine)
    fill(engine, 1e30)
    taken, norm, _ = engine.optimizer.step()
    assert (taken, norm) == (True, float("inf"))
    assert not any(map(torch.equal, masters_of(engine), before))


@pytest.mark.parametrize("chained", [False, True], ids=["one", "chained"])
def test_finite_gradients_of_an_infinite_norm_are_a_skipped_step(
    activated: Activate, make_engine: Callable[..., Any], chained: bool
) -> None:
    from fp16_patch.scaling.optimizer_step import history_of

    activated()
    engine = make_engine()
    if chained:
        experts(engine)
    before = masters_of(engine)
    fill(engine, 1e30)
    assert engine.optimizer_step() == float("inf")
    assert all(map(torch.equal, masters_of(engine), before))
    assert history_of(engine).last == StepOutcome(2.0**15, True, float("inf"))
    fill(engine, 0.5)
    assert engine.optimizer_step() < 10
    assert not any(map(torch.equal, masters_of(engine), before))
    assert not {"step", "clip_grad_norm", "get_grad_norm", "step_with_ready_grads"} & vars(engine.optimizer).keys()


def test_a_scale_that_grew_before_the_norm_was_known_is_lowered_all_the_same(
    activated: Activate, make_engine: Callable[..., Any]
) -> None:
    activated()
    engine = make_engine()
    scaler = engine.optimizer.grad_scaler
    scaler.interval, scaler._growth_tracker = 5, 4
    fill(engine, 1e30)
    assert engine.optimizer_step() == float("inf")
    assert float(scaler.scale) == 2.0**15
    assert scaler._growth_tracker == 0


def test_in_bfloat16_too_a_norm_of_nan_is_a_skipped_step(activated: Activate, make_engine: Callable[..., Any]) -> None:
    activated(mode="bf16")
    engine = make_engine()
    engine.optimizer.grad_scaler = None
    before = masters_of(engine)
    for parameter in engine.optimizer.parameters:
        parameter.main_grad.fill_(float("nan"))
    engine.optimizer_step()
    assert all(map(torch.equal, masters_of(engine), before))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -4.0])
def test_a_scale_that_is_none_costs_one_step_and_starts_anew(
    activated: Activate, make_engine: Callable[..., Any], scale: float
) -> None:
    activated(init_scale=1024)
    engine = make_engine(0.5, 0.5)
    engine.optimizer.grad_scaler._scale.fill_(scale)
    before = masters_of(engine)
    engine.optimizer_zero_grad()
    engine.forward_backward_batch()
    assert engine.optimizer_step() == float("inf")
    assert all(map(torch.equal, masters_of(engine), before))
    assert engine.optimizer.grad_scaler.scale.item() == 1024
    engine.optimizer_zero_grad()
    engine.forward_backward_batch()
    assert engine.optimizer_step() == pytest.approx(0.5 * 32**0.5)


def test_in_mode_observe_a_skip_stays_verls_error(activated: Activate, make_engine: Callable[..., Any]) -> None:
    activated(mode="observe")
    with pytest.raises(NotImplementedError):
        make_engine(parts.HUGE).train_batch({}, None)


def test_what_is_kept_in_fp32_is_in_the_ledger(activated: Activate, make_engine: Callable[..., Any]) -> None:
    from fp16_patch.runtime.activation import ledger

    activated()
    engine = make_engine(0.5)
    engine.forward_backward_batch()
    engine.optimizer_step()
    assert ledger().roles["actor"] == {"gradient": ["float32"], "master": ["float32"]}


def optimizer_config(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    from omegaconf import OmegaConf

    module = module_of("megatron-loss-scale")
    monkeypatch.setattr(module, "OptimizerConfig", SimpleNamespace)
    config = {"optimizer": "adam", "lr": 1e-6, "min_lr": 0.0, "clip_grad": 1.0, "weight_decay": 0.0, **settings}
    parameters = inspect.signature(module.init_megatron_optim_config).parameters
    fp16 = {"fp16": True} if "fp16" in parameters else {}
    return module.init_megatron_optim_config(OmegaConf.create(config), **fp16)


def test_the_stock_loss_scale_is_not_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    config = optimizer_config(monkeypatch)
    assert getattr(config, "initial_loss_scale", None) in (None, 32768)
    assert not hasattr(config, "loss_scale_window")
    assert not hasattr(config, "hysteresis")


def test_the_loss_scale_is_the_plans(activated: Activate, monkeypatch: pytest.MonkeyPatch) -> None:
    activated(init_scale=1024, min_scale=2, growth_interval=50, hysteresis=3)
    config = optimizer_config(monkeypatch)
    assert (config.initial_loss_scale, config.min_loss_scale) == (1024, 2)
    assert (config.loss_scale_window, config.hysteresis, config.loss_scale) == (50, 3, None)
    assert (config.fp16, config.bf16, config.params_dtype) == (True, False, torch.float16)
    assert config.main_params_dtype == config.exp_avg_dtype == config.exp_avg_sq_dtype == torch.float32


@pytest.fixture
def build_optimizer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def build(chunk: parts.Chunk, optimizer: Any) -> Any:
        module = module_of("megatron-loss-scaler")
        monkeypatch.setattr(module, "get_megatron_optimizer_native", lambda **_: optimizer)
        return module.get_megatron_optimizer(model=[chunk], config=None)

    return build


def test_the_scalers_have_the_plans_factors_and_losses_their_scale(
    activated: Activate, build_optimizer: Callable[..., Any]
) -> None:
    activated(growth_factor=4, backoff_factor=0.25)
    chunk = parts.Chunk()
    optimizer = build_optimizer(chunk, parts.Optimizer(chunk))
    assert (optimizer.grad_scaler.growth_factor, optimizer.grad_scaler.backoff_factor) == (4, 0.25)
    assert chunk.config.grad_scale_func(torch.tensor(1.0)) == 2.0**16


def test_stock_leaves_the_factors_and_the_loss_alone(build_optimizer: Callable[..., Any]) -> None:
    chunk = parts.Chunk()
    optimizer = build_optimizer(chunk, parts.Optimizer(chunk))
    assert optimizer.grad_scaler.backoff_factor == 0.5
    assert chunk.config.grad_scale_func is None


def test_an_optimizer_without_a_scaler_is_refused(activated: Activate, build_optimizer: Callable[..., Any]) -> None:
    activated()
    chunk = parts.Chunk()
    with pytest.raises(RuntimeError, match="without a loss scaler"):
        build_optimizer(chunk, parts.Optimizer(chunk, scaled=False))


def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's package of Megatron models, or an empty one where it cannot be imported: 0.5.0 needs Triton for it."""
    try:
        return import_module("verl.models.mcore")
    except ImportError:
        monkeypatch.setitem(sys.modules, "verl.models.mcore", ModuleType("verl.models.mcore"))
        return sys.modules["verl.models.mcore"]


@pytest.fixture
def bridges(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put a bridge where verl looks for one."""

    def put(provides: bool, **config: Any) -> Any:
        bridge: Any = parts.ProvidingBridge(**config) if provides else None
        made: list[Any] = [bridge]
        # Before 0.6.1 a configuration is made without the bridge, too, and thrown away.
        monkeypatch.setattr(models(monkeypatch), "hf_to_mcore_config", lambda *_, **__: None, raising=False)

        def from_config(hf_config: Any, dtype: Any = torch.bfloat16) -> parts.Bridge:
            made[0] = parts.Bridge(dtype, **config)
            return made[0]

        auto = SimpleNamespace(from_config=from_config, from_hf_pretrained=lambda *_, **__: bridge)
        for name in ("mbridge", "bridge"):
            module: Any = ModuleType(f"verl.models.mcore.{name}")
            module.AutoBridge, module.freeze_moe_router = auto, None
            module.make_value_model = lambda *_: None
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return made

    return put


@pytest.fixture
def init_worker(bridges: Callable[..., Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from omegaconf import OmegaConf

    def init(provides: bool = False, use_mbridge: bool = True, **config: Any) -> Any:
        module = module_of("megatron-worker-dtype")
        bridges(provides, **config)
        parameters = inspect.signature(module.MegatronWorker._init_hf_config_and_tf_config).parameters
        if provides and "megatron_config" not in parameters:
            pytest.skip("it knows one bridge")
        settings = OmegaConf.create({**parallel_sizes(), "use_mbridge": use_mbridge, "vanilla_mbridge": not provides})
        bridge = {"megatron_config": settings} if "megatron_config" in parameters else {"use_mbridge": use_mbridge}
        # Not one that takes part in anything: what makes a worker reaches for its group.
        of_rank_0 = type("Worker", (module.MegatronWorker,), {"rank": 0})
        worker = object.__new__(of_rank_0)
        worker.config = OmegaConf.create({"model": {}})
        worker._init_hf_config_and_tf_config(str(tiny_model), None, torch.bfloat16, {}, {}, **bridge)
        return worker

    return init


def parallel_sizes() -> dict[str, Any]:
    groups = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "virtual_pipeline_model", "context")
    return {**{f"{group}_parallel_size": 1 for group in groups}, "sequence_parallel": False}


def config_of(owner: Any) -> Any:
    return owner.tf_config or owner.provider


def is_float16(config: Any) -> bool:
    dtypes = {config.params_dtype, config.pipeline_dtype, getattr(config, "autocast_dtype", torch.float16)}
    return dtypes == {torch.float16} and bool(config.fp16) and not config.bf16


@BOTH
def test_stock_workers_are_of_the_dtype_they_are_given(init_worker: Callable[..., Any], provides: bool) -> None:
    assert not is_float16(config_of(init_worker(provides)))


@BOTH
def test_workers_take_the_plans_dtype(activated: Activate, init_worker: Callable[..., Any], provides: bool) -> None:
    activated()
    worker = init_worker(provides)
    assert is_float16(config_of(worker))
    assert worker.dtype == worker.param_dtype == torch.float16


def test_a_bridge_of_before_0_6_1_is_told_the_dtype(activated: Activate, init_worker: Callable[..., Any]) -> None:
    activated()
    bridge = init_worker().bridge
    bridge.get_model(post_model_creation_callbacks=[], wrap_with_ddp=True)
    assert (bridge.dtype, bridge.built["fp16"], bridge.built["bf16"]) == (torch.float16, True, False)


def test_a_worker_without_a_bridge_is_refused(activated: Activate, init_worker: Callable[..., Any]) -> None:
    from fp16_patch import PlanError

    activated()
    with pytest.raises((PlanError, AssertionError), match=r"use_mbridge.*[Tt]rue"):
        init_worker(use_mbridge=False)


@BOTH
@pytest.mark.parametrize(("before", "after"), [(None, "fp32"), ("fp32", "fp32"), ("fp64", "fp64")])
def test_the_router_of_a_mixture_of_experts_is_in_fp32(
    activated: Activate, init_worker: Callable[..., Any], provides: bool, before: Any, after: str
) -> None:
    activated()
    config = config_of(init_worker(provides, num_moe_experts=8, moe_router_dtype=before))
    assert config.moe_router_dtype == after


@pytest.fixture
def build_engine(bridges: Callable[..., Any], tiny_model: Path) -> Callable[..., Any]:
    from transformers import AutoConfig

    def build(provides: bool = False, dtype: str = "bfloat16", **config: Any) -> Any:
        module = module_of("megatron-engine-dtype")
        bridges(provides, **config)
        engine = module.MegatronEngine.__new__(module.MegatronEngine)
        if provides and "vanilla" not in inspect.getsource(module.MegatronEngine):
            pytest.skip("it knows one bridge")
        engine.engine_config = SimpleNamespace(
            dtype=dtype,
            use_mbridge=True,
            vanilla_mbridge=not provides,
            override_transformer_config={},
            dynamic_context_parallel=False,
            **parallel_sizes(),
        )
        engine.model_config = SimpleNamespace(
            hf_config=AutoConfig.from_pretrained(tiny_model),
            local_path=str(tiny_model),
            trust_remote_code=False,
            share_embeddings_and_output_weights=False,
            model_type="language_model",
            mtp=SimpleNamespace(enable=False),
        )
        engine.enable_routing_replay = engine._qat_enabled = False
        engine._build_tf_config()
        return engine

    return build


@BOTH
def test_stock_engines_are_of_the_dtype_of_their_role(build_engine: Callable[..., Any], provides: bool) -> None:
    assert not is_float16(config_of(build_engine(provides)))


@BOTH
def test_engines_take_the_plans_dtype(activated: Activate, build_engine: Callable[..., Any], provides: bool) -> None:
    activated()
    engine = build_engine(provides)
    assert is_float16(config_of(engine))
    assert engine.param_dtype == engine.dtype == torch.float16


def test_a_router_is_in_fp32_in_the_engine_too(activated: Activate, build_engine: Callable[..., Any]) -> None:
    activated()
    assert config_of(build_engine(num_moe_experts=8, moe_router_dtype=None)).moe_router_dtype == "fp32"


@pytest.fixture
def make_module(bridges: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that builds a model with verl's own, and returns the model and what its buffers were asked to be."""

    def make(provides: bool, engine: Any = None, **wrap: Any) -> tuple[Any, dict[str, Any]]:
        module = module_of("megatron-gradient-dtype")
        if provides and "provider" not in inspect.signature(module.make_megatron_module).parameters:
            pytest.skip("it knows one bridge")
        made = bridges(provides, sequence_parallel=False)
        monkeypatch.setattr(module, "get_model_config", lambda chunk: chunk.config)
        utilities: Any = ModuleType("megatron.bridge.training.utils.config_utils")
        utilities.create_ddp_config = lambda overrides, **_: SimpleNamespace(**(overrides or {}))
        monkeypatch.setitem(sys.modules, utilities.__name__, utilities)
        training: Any = ModuleType("megatron.bridge.training.config")
        training.DistributedDataParallelConfig = parts.Provider
        monkeypatch.setitem(sys.modules, training.__name__, training)
        auto = sys.modules["verl.models.mcore.mbridge"].AutoBridge
        bridge = engine.bridge if engine else made[0] or auto.from_config(None)
        provider = getattr(bridge, "provider", None)
        chunks = module.make_megatron_module(
            wrap_config=module.McoreModuleWrapperConfig(**wrap),
            tf_config=None if provides else bridge.config,
            hf_config=SimpleNamespace(hidden_size=4, rope_theta=1.0, rope_parameters=None),
            bridge=bridge,
            **({"provider": provider} if provides else {}),
        )
        asked = provider.built and vars(provider.built) if provides else bridge.built.get("ddp_config")
        return chunks[0][0] if isinstance(chunks, tuple) else chunks[0], asked

    return make


@BOTH
def test_stock_leaves_the_dtype_of_gradients_to_the_bridge(make_module: Callable[..., Any], provides: bool) -> None:
    assert "grad_reduce_in_fp32" not in (make_module(provides)[1] or {})


@BOTH
def test_gradients_are_reduced_in_fp32(activated: Activate, make_module: Callable[..., Any], provides: bool) -> None:
    activated()
    asked = make_module(provides)[1]
    if asked is None:
        pytest.skip("its bridge is asked for nothing, and reduces in FP32")
    assert asked["grad_reduce_in_fp32"] is True


@BOTH
@pytest.mark.parametrize(
    ("wrap", "role"),
    [
        ({}, "actor"),
        ({"wrap_with_ddp": False}, "ref"),
        ({"is_value_model": True}, "critic"),
        ({"is_value_model": True, "wrap_with_ddp": False}, "reward"),
    ],
)
def test_what_a_model_computes_in_is_in_the_ledger(
    activated: Activate, make_module: Callable[..., Any], provides: bool, wrap: dict[str, bool], role: str
) -> None:
    from fp16_patch.runtime.activation import ledger

    activated()
    chunk, _ = make_module(provides, **wrap)
    chunk(torch.ones(1, 4, dtype=torch.float16))
    assert ledger().roles[role] == {name: ["float16"] for name in ("autocast", "parameter", "activation")}


def test_the_actor_of_muons_layer_wise_optimizer_is_no_ref(
    activated: Activate,
    build_engine: Callable[..., Any],
    make_module: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bridge is told to build it without DDP, which verl puts around it afterwards."""
    from fp16_patch.runtime.activation import ledger

    module = module_of("megatron-gradient-dtype")
    if not hasattr(module, wrapper := "wrap_model_chunks_with_layerwise_aware_ddp"):
        pytest.skip("it knows no such optimizer")
    monkeypatch.setattr(module, wrapper, lambda chunks, *_, **__: chunks)
    activated()
    chunk, _ = make_module(False, engine=build_engine(), use_layer_wise_distributed_optimizer=True)
    chunk(torch.ones(1, 4, dtype=torch.float16))
    assert set(ledger().roles) == {"actor"}


@pytest.mark.parametrize(
    ("bridge", "model", "named"),
    [
        ("DeepseekV3Bridge", {}, "megatron.vanilla_mbridge=True: mbridge loads models of DeepSeek-V3's architecture"),
        ("Qwen2Bridge", {"experimental_attention_variant": "dsa"}, "experimental_attention_variant=dsa: Megatron"),
    ],
)
def test_what_a_bridge_has_in_bfloat16_only_is_refused_but_in_bfloat16(
    bridge: str, model: dict[str, str], named: str
) -> None:
    from fp16_patch.verl.megatron.dtypes import _bridge_conflicts

    made, config = type(bridge, (), {})(), SimpleNamespace(**model)
    (conflict,) = _bridge_conflicts(made, config, Plan(mode="fp16"))
    assert named in str(conflict)
    assert list(_bridge_conflicts(made, config, Plan(mode="bf16"))) == []


@pytest.mark.megatron
def test_the_names_of_what_is_in_bfloat16_only_are_those_of_the_real_packages() -> None:
    # Stand-ins can be imported here.
    if installed_release("mbridge") is None:
        pytest.skip("Megatron and its bridges are not installed here")
    bridge = Installed().read("mbridge.models.deepseek_v3")
    assert bridge is not None
    assert "class DeepseekV3Bridge" in bridge
    assert "only support bfloat16" in bridge
    if Version(installed_release("megatron-core") or "0") < Version("0.16"):
        return  # it has no such attention
    attention = Installed().read("megatron.core.transformer.experimental_attention_variant.dsa")
    assert attention is not None
    assert "torch.bfloat16" in attention


def test_stock_merger_loads_shards_into_a_bfloat16_model(merge: Callable[[], Any]) -> None:
    assert merge() == (torch.bfloat16, None)


def test_shards_are_merged_in_the_plans_dtype(activated: Activate, merge: Callable[[], Any]) -> None:
    activated()
    assert merge() == (torch.float16, True)


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The dtype of the model that verl's merger builds, and whether Megatron is told that it is float16."""

    def built() -> Any:
        try:
            module = module_of("megatron-merger-shards")
        except ImportError as missing:
            pytest.skip(f"needs {missing.name}")
        seen: list[Any] = []

        def get_model(*, transformer_config: Any, **_: Any) -> Any:
            seen.append((transformer_config.dtype, getattr(transformer_config, "fp16", None)))
            return []

        monkeypatch.setattr(module, "hf_to_mcore_config", lambda hf, dtype, **_: SimpleNamespace(dtype=dtype))
        monkeypatch.setattr(module, "get_model", get_model)
        monkeypatch.setattr(module, "load_dist_checkpointing", lambda *_: {})
        merger = module.MegatronModelMerger.__new__(module.MegatronModelMerger)
        merger.hf_config, merger.world_size = SimpleNamespace(num_hidden_layers=2, tie_word_embeddings=False), 1
        merger.config = SimpleNamespace(use_cpu_initialization=False)
        merger._load_state_dicts("nowhere")
        return seen[0]

    return built
