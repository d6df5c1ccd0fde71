"""verl's own learner on gloo ranks, put through what FP16 training meets; prints nothing, leaves one JSON of facts.

Started by `tests.ranks`; see `fsdp/test_learner.py`. Nothing here looks at fp16_patch, or tells it more than the
driver of a run would: the same facts are taken from stock verl and from verl under a plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    VeOmniEngineConfig,
    VeOmniOptimizerConfig,
)
from verl.workers.config.engine import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

sys.path.insert(0, str(Path(__file__).parents[2]))
from integration.bench.passes import GradientPasses
from tests.verl.folder import folder_facts

# Large enough to overflow FP16 gradients, small enough for a finite FP32 loss.
OVERFLOWING = 1e30
SEQUENCES, PROMPT, RESPONSE = 4, 4, 8
TOKENS = PROMPT + RESPONSE


class Learner:
    """One `TrainingWorker` with a loss that can be made to overflow on chosen ranks."""

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        self.poisoned_ranks: set[int] = set()
        self.factor = 1.0
        self.computed = 0
        self.worker = TrainingWorker(worker_config(arguments, **settings))
        self.worker.reset()
        self.worker.set_loss_fn(self.loss)
        self.engine = self.worker.engine

    def loss(self, model_output: dict[str, Any], data: TensorDict, dp_group: Any) -> tuple[torch.Tensor, dict]:
        output = model_output["log_probs"] if "log_probs" in model_output else model_output["values"]
        factor = OVERFLOWING if dist.get_rank() in self.poisoned_ranks else 1.0
        self.computed += 1
        return -output.values().float().mean() * factor * self.factor, {}

    def step(self, poisoned: set[int] = frozenset(), data: TensorDict | None = None) -> dict[str, Any]:  # type: ignore[assignment]
        """One optimizer step and the metrics the driver gets from it."""
        self.poisoned_ranks = poisoned
        data = batch() if data is None else data
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=[TOKENS] * SEQUENCES)
        return dict(tu.get(self.worker.train_batch(data), "metrics"))

    def two_mini_batches(self, poisoned_first: bool) -> dict[str, Any]:
        """An update of two mini-batches, the first of which overflows; metrics as the driver reduces them."""
        from verl.utils.metric import reduce_metrics

        steps = iter([{0}, set()] if poisoned_first else [set(), set()])
        inner = self.worker.train_batch

        def train_batch(data: TensorDict) -> Any:
            self.poisoned_ranks = next(steps)
            return inner(data)

        self.worker.train_batch = train_batch
        data = batch(2 * SEQUENCES)
        tu.assign_non_tensor(data, mini_batch_size=SEQUENCES * dist.get_world_size(), epochs=1)
        metrics = tu.get(self.worker.train_mini_batch(data), "metrics")
        self.worker.train_batch = inner
        return {name: float(value) for name, value in reduce_metrics(dict(metrics)).items()}

    def state(self) -> torch.Tensor:
        """Parameters and optimizer state, one after the other."""
        moments = [
            local(value).detach().float().flatten().clone()
            for parameter in self.engine.optimizer.param_groups[0]["params"]
            for _, value in sorted(self.engine.optimizer.state[parameter].items())
        ]
        return torch.cat([self.parameters(), *moments])

    def parameters(self) -> torch.Tensor:
        """All local parameters, one after the other."""
        return torch.cat([local(parameter).detach().flatten().clone() for parameter in self.engine.module.parameters()])

    def lr(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])


def worker_config(
    arguments: argparse.Namespace,
    *,
    model_type: str = "language_model",
    lora_rank: int = 0,
    forward_only: bool = False,
    engine: dict[str, Any] | None = None,
    dropout: float = 0.0,
    optimizer: dict[str, Any] | None = None,
) -> TrainingWorkerConfig:
    of_values = model_type == "value_model" and arguments.value_model
    model = HFModelConfig(
        path=arguments.value_model if of_values else arguments.model,
        hf_config_path=config_with_dropout(arguments, dropout) if arguments.strategy == "veomni" and dropout else None,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa", **({"attention_dropout": dropout} if dropout else {})},
        lora_rank=lora_rank,
        lora_alpha=2 * lora_rank,
        lora={"merge": True} if lora_rank else {},
    )
    batches = {
        "forward_only": forward_only,
        "use_torch_compile": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "infer_micro_batch_size_per_gpu": 2,
    }
    schedule = {"lr": 1e-3, "total_training_steps": 100, "weight_decay": 0.0}
    if arguments.strategy == "veomni":
        # The config names no dtype: there is no key for one.
        engine_config = VeOmniEngineConfig(**batches, **VEOMNI, **(engine or {}))
        optimizer_config = VeOmniOptimizerConfig(lr_warmup_steps_ratio=0.04, **schedule, **(optimizer or {}))
    else:
        chosen = engine if engine is not None else STOCK_FP16
        engine_config = FSDPEngineConfig(strategy=arguments.strategy, **batches, **chosen)
        optimizer_config = FSDPOptimizerConfig(lr_warmup_steps=4, override_optimizer_config=optimizer, **schedule)
    # FSDP1 on several CPU ranks cannot gather a full state dict: offloading frees the storage it is about to read.
    exportable = arguments.strategy != "fsdp" or dist.get_world_size() == 1
    checkpoint = CheckpointConfig(save_contents=["model", "optimizer", "extra", *(["hf_model"] if exportable else [])])
    return TrainingWorkerConfig(
        model_type=model_type,
        model_config=model,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=checkpoint,
    )


def config_with_dropout(arguments: argparse.Namespace, dropout: float) -> str:
    """A folder of the model's configuration with dropout: VeOmni reads a file, and no overrides."""
    folder = Path(arguments.out) / "with_dropout"
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        config = json.loads(Path(arguments.model, "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
    dist.barrier()
    return str(folder)


# The one switch verl's FSDP engine reads; under a plan it is overruled, and the runs below leave it as it is.
STOCK_FP16 = {"mixed_precision": {"param_dtype": "fp16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}}
# As verl's YAML has it, but for kernels that a CPU has.
VEOMNI = {
    "mixed_precision": True,
    "enable_full_shard": True,
    "attn_implementation": "eager",
    "moe_implementation": "eager",
}
# What verl documents as the switch.
DOCUMENTED_FP16 = {"dtype": "float16"}


def batch(sequences: int = SEQUENCES) -> TensorDict:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return as_batch([torch.randint(2, 90, (TOKENS,), generator=generator) for _ in range(sequences)])


def as_batch(rows: list[torch.Tensor], **more: list[torch.Tensor]) -> TensorDict:
    nested = {
        **more,
        "input_ids": rows,
        "position_ids": [torch.arange(TOKENS) for _ in rows],
        "loss_mask": [torch.ones(TOKENS, dtype=torch.int64) for _ in rows],
    }
    tensors = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in nested.items()}
    return tu.get_tensordict(tensors, non_tensor_dict={"temperature": 1.0})


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def watching_compute(module: torch.nn.Module) -> Iterator[set[str]]:
    """The dtypes that a projection inside the model really multiplies in."""
    seen: set[str] = set()
    linear = next(child for name, child in module.named_modules() if "q_proj" in name and hasattr(child, "weight"))
    handle = linear.register_forward_hook(lambda _layer, _inputs, output: seen.add(dtype_name(output.dtype)))
    yield seen
    handle.remove()


def compute_dtypes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What actor, critic and ref compute in when the documented key asks for float16."""
    facts: dict[str, Any] = {}
    for role, settings in (
        ("actor", {}),
        ("critic", {"model_type": "value_model"}),
        ("ref", {"forward_only": True}),
    ):
        learner = Learner(arguments, engine=DOCUMENTED_FP16, **settings)
        with watching_compute(learner.engine.module) as seen:
            if role == "ref":
                data = batch()
                tu.assign_non_tensor(data, compute_loss=False)
                learner.worker.infer_batch(data)
            else:
                learner.step()
        scaler = getattr(learner.engine, "scaler", None)
        facts[role] = {"dtypes": sorted(seen), "scaler": scaler is not None and scaler.is_enabled()}
    return facts


def rope(arguments: argparse.Namespace) -> dict[str, Any]:
    """RoPE frequencies of a reference that is stored in half, and how far they are from those of one in FP32."""
    found = {}
    for stored in ("bfloat16", "float32"):
        module = Learner(arguments, forward_only=True, engine={"model_dtype": stored}).engine.module
        found[stored] = [buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")]
    halved, whole = found["bfloat16"], found["float32"]
    apart = max(float((half.float() - full.float()).abs().max()) for half, full in zip(halved, whole, strict=True))
    return {"dtypes": sorted({dtype_name(buffer.dtype) for buffer in halved}), "apart": apart}


def overflow_on_one_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """A clean step, then one whose gradients overflow on the last rank only, then a clean one."""
    learner = Learner(arguments)
    clean = learner.step()
    before, lr_before = learner.parameters(), learner.lr()
    overflow = learner.step(poisoned={dist.get_world_size() - 1})
    after, lr_after = learner.parameters(), learner.lr()
    last = learner.step()
    scaler = getattr(learner.engine, "scaler", None)
    return {
        "clean_metrics": plain(clean),
        "overflow_metrics": plain(overflow),
        "last_metrics": plain(last),
        "unchanged_on_every_rank": on_every_rank(torch.equal(before, after)),
        "moved_by_a_clean_step": on_every_rank(not torch.equal(after, learner.parameters())),
        "nan_parameters": sum_over_ranks(int(after.isnan().sum())),
        "lr": [lr_before, lr_after, learner.lr()],
        "scaler_enabled": scaler is not None and scaler.is_enabled(),
    }


def averaged_norm(arguments: argparse.Namespace) -> dict[str, Any]:
    """The grad_norm a user sees for an update in which one of two mini-batches was skipped."""
    return Learner(arguments).two_mini_batches(poisoned_first=True)


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """Skip, step, save; then what a fresh learner goes on with after loading."""
    learner = Learner(arguments)
    for poisoned in (set(range(dist.get_world_size())), set(), set()):
        learner.step(poisoned)
    saved = scaler_facts(learner)
    path = str(Path(arguments.out) / "checkpoint")
    learner.engine.save_checkpoint(path, global_step=3)
    fresh = Learner(arguments)
    fresh.step()
    fresh.engine.load_checkpoint(path, del_local_after_load=False)
    resumed = scaler_facts(fresh)
    fresh.step()
    return {"saved": saved, "resumed": resumed, "next": scaler_facts(fresh), "path": path}


# With a mean over few tokens, gradients are finite a few halvings below it.
TOO_HIGH = 2.0**21
# Makes gradients overflow at 65536 and at the scale after it.
STEEP = 2.0**6
# The first scale that fits gradients so steep with the margin.
FITTING = 128.0
DROPOUT = 0.2


def retried(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three updates from far too high a scale, with dropout; the same from the scale that was found.

    Each is of two micro-batches. The second run has nothing to retry, so it says what the first should have come to.
    """
    found = dropout_run(arguments, TOO_HIGH)
    clean = dropout_run(arguments, found["scales"][0])
    other = dropout_run(arguments, found["scales"][0], seed=12)
    same = {name: on_every_rank(found[name] == clean[name]) for name in ("state", "random", "losses", "norms", "lr")}
    return {"same": same, "dropout_matters": other["state"] != clean["state"], "found": found, "clean": clean}


def first_scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three updates of gradients that overflow at 65536, from too high a scale and from the one that fits."""
    runs = {"too_high": TOO_HIGH, "fitting": FITTING}
    return {name: dropout_run(arguments, start, factor=STEEP) for name, start in runs.items()}


def dropout_run(arguments: argparse.Namespace, start: float, factor: float = 1.0, seed: int = 11) -> dict[str, Any]:
    """What three updates leave behind: digests of parameters and optimizer state, and of the generators."""
    learner = Learner(arguments, dropout=DROPOUT)
    learner.factor = factor
    start_at(learner, start)
    torch.manual_seed(seed + dist.get_rank())
    steps, scales, lr = [], [], []
    for _ in range(3):
        steps.append(learner.step())
        scales.append(scale(learner))
        lr.append(learner.lr())
    return {
        "state": digest(learner.state()),
        "random": digest(torch.get_rng_state()),
        "losses": [step["loss"] for step in steps],
        "norms": [step.get("grad_norm") for step in steps],
        "metrics": [plain(step) for step in steps],
        "scales": scales,
        "lr": lr,
        "computed": learner.computed,
    }


def start_at(learner: Learner, start: float) -> None:
    learner.engine.scaler.load_state_dict({**learner.engine.scaler.state_dict(), "scale": start})


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def lost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Six mini-batches, every other one with steep gradients on the last rank only: how many the optimizer took."""
    learner = Learner(arguments)
    steps = []
    for number in range(6):
        start_at(learner, 65536.0)
        # As one huge advantage does.
        steep = number % 2 == 1 and dist.get_rank() == dist.get_world_size() - 1
        learner.factor = STEEP if steep else 1.0
        steps.append(learner.step())
    [state, *_] = learner.engine.optimizer.state.values()
    return {"taken": int(state["step"]), "metrics": [plain(step) for step in steps]}


def grown(arguments: argparse.Namespace) -> dict[str, Any]:
    """Twenty updates of the same gradients, from three doublings below the largest scale that bears them."""
    learner = Learner(arguments)
    start_at(learner, TOO_HIGH)
    frozen_step(learner)
    bearable = scale(learner)
    start_at(learner, bearable / 8)
    steps = [frozen_step(learner) for _ in range(20)]
    return {
        "bearable": bearable,
        "scale": [of_ranks(step, "fp16/loss_scale/min") for step in steps],
        "retries": [of_ranks(step, "fp16/retries/max") for step in steps],
        "headroom": [of_ranks(step, "fp16/gradient_headroom/min") for step in steps],
        "on_every_rank": on_every_rank(len(set(gathered(scale(learner)))) == 1),
        "growth": gathered(scaler_facts(learner)["growth"]),
    }


def of_ranks(metrics: dict[str, Any], name: str) -> list[float]:
    """A metric as every rank gives it; none where it is not there."""
    return [value for [value] in metrics.get(name, [])]


def frozen_step(learner: Learner) -> dict[str, Any]:
    """A step that leaves the parameters as they are."""
    for group in learner.engine.optimizer.param_groups:
        group["lr"] = 0.0
    return learner.step()


def gathered(fact: Any) -> list[Any]:
    facts = [fact] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


def underflow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two updates at a scale at which many gradients underflow, with what can be counted of the first beside it."""
    learner = Learner(arguments)
    learner.factor = 1e-2
    start_at(learner, 1.0)
    with counting_gradients(learner.engine.module) as counted:
        first = learner.step()
    second = learner.step()
    first, second = (
        {name: of_ranks(step, name) for name in step if name.startswith("fp16/")} for step in (first, second)
    )
    return {"first": first, "second": second, "counted": counted}


@contextmanager
def counting_gradients(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Of all FP16 gradients of modules without children: zero or subnormal among those in rows that are not all zero.

    By layer, or by name outside the layers; over all ranks.
    """
    counted: dict[str, list[int]] = {}
    largest = [0.0]

    def count(group: str, gradient: torch.Tensor) -> None:
        rows = local(gradient).detach().reshape(-1, gradient.shape[-1]).float()
        alive = rows[rows.abs().amax(dim=-1) > 0]
        known = counted.setdefault(group, [0, 0])
        known[0] += int((alive.abs() < 2.0**-14).sum())
        known[1] += alive.numel()
        largest[0] = max(largest[0], float(rows.abs().max()))

    def before(group: str, layer: torch.nn.Module, _inputs: Any) -> None:
        for value in [*layer._parameters.values(), *vars(layer).values()]:
            if not isinstance(value, torch.Tensor) or not value.requires_grad or any(value is one for one in seen):
                continue
            seen.append(value)
            value.register_hook(lambda gradient: count(group, gradient))

    def after(group: str, _layer: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: count(group, gradient))

    # FSDP1 makes views anew for each micro-batch, FSDP2's parameters are the same objects for all. Embedding and head
    # may share one: its gradient is the sum of both, and is counted where the model first uses it.
    seen: list[torch.Tensor] = []
    handles = []
    for name, layer in module.named_modules():
        if not list(layer.children()):
            found = re.search(r"layers\.(\d+)\.", name)
            group = f"layer {found[1]}" if found else "embedding" if "embed_tokens" in name else "head"
            handles.append(layer.register_forward_pre_hook(partial(before, group)))
            handles.append(layer.register_forward_hook(partial(after, group)))
    facts: dict[str, Any] = {}
    yield facts
    for handle in handles:
        handle.remove()
    of_ranks = gathered((counted, largest[0]))
    for group in sorted({group for counts, _ in of_ranks for group in counts}):
        below, elements = (sum(counts[group][place] for counts, _ in of_ranks) for place in (0, 1))
        facts[group] = {"below": below, "elements": elements}
    facts["largest"] = max(reach for _, reach in of_ranks)


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """On ranks whose groups share nothing (`fsdp_size=1`), an update that overflows at every scale on the last one."""
    learner = Learner(arguments, engine={"fsdp_size": 1})
    learner.step()
    before = learner.parameters()
    learner.step(poisoned={dist.get_world_size() - 1})
    unchanged = torch.equal(before, learner.parameters())
    return {"unchanged_on_every_rank": on_every_rank(unchanged), "scale": learner.engine.scaler.get_scale()}


def infinite_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """An update whose loss is infinite on one rank: no lower scale helps."""
    learner = Learner(arguments)
    learner.step()
    computed, before = learner.computed, scale(learner)
    learner.factor = math.inf if dist.get_rank() == 0 else 1.0
    metrics = learner.step()
    return {"metrics": plain(metrics), "computed": learner.computed - computed, "halved": before / scale(learner)}


def resume_from_stock(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loading a checkpoint that holds no scaler state; then one in which that of some ranks is damaged."""
    path = Path(arguments.out) / "checkpoint"
    states = {state: state.read_bytes() for state in sorted(path.glob("fp16_patch_*"))}
    whole = dict(states)
    write(dict.fromkeys(states))
    fresh = Learner(arguments)
    fresh.engine.load_checkpoint(str(path), del_local_after_load=False)
    facts = scaler_facts(fresh)
    first, *_, last = *states, *states
    damage = {"first": {first: b"[1]"}, "last": {last: whole[last][:40]}, "all": dict.fromkeys(states, b"")}
    return {**facts, "damaged": {name: scale_after(fresh, path, {**whole, **files}) for name, files in damage.items()}}


def scale_after(learner: Learner, path: Path, states: dict[Path, bytes | None]) -> list[float]:
    """Load a checkpoint with these state files from a scale of 4096: the scale on each rank then."""
    write(states)
    start_at(learner, 4096.0)
    learner.engine.load_checkpoint(str(path), del_local_after_load=False)
    scales = [0.0] * dist.get_world_size()
    dist.all_gather_object(scales, scale(learner))
    return scales


def write(states: dict[Path, bytes | None]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        for path, content in states.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
    dist.barrier()


def endless_overflow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Non-finite gradients in every step, on one rank: how far the scale falls and what the run says."""
    learner = Learner(arguments)
    module = learner.engine.module
    learner.step()
    for attempt in range(1, 201):
        learner.engine.optimizer_zero_grad()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if dist.get_rank() == dist.get_world_size() - 1:
            local(next(p for p in module.parameters() if local(p).numel()).grad).view(-1)[-1] = math.nan
        try:
            learner.engine.optimizer_step()
        except Exception as stopped:  # the facts are what is asserted on
            return {
                "attempt": attempt,
                "error": type(stopped).__name__,
                "message": str(stopped),
                "scale": scale(learner),
            }
    return {"attempt": 200, "error": None, "message": "", "scale": scale(learner)}


def wire(arguments: argparse.Namespace) -> dict[str, Any]:
    """Weights as the sampler gets them: their dtypes and bytes, and whether they are the masters to the last bit."""
    learner = Learner(arguments)
    learner.step()
    masters = {name: full(value) for name, value in learner.engine.module.state_dict().items()}
    sent, _ = learner.engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    weights = dict(sent)
    return {
        "dtypes": sorted({dtype_name(weight.dtype) for weight in weights.values()}),
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights.values()),
        "exact": all(torch.equal(weight.float(), masters[name]) for name, weight in weights.items()),
    }


# `kept` of a sampler with none, one with a router and one with a weight that comes from nowhere.
KEEPS = {
    "nothing": {"parameters": [], "buffers": ["rotary_emb.cos_sin_cache"]},
    "some": {"parameters": ["input_layernorm.weight"], "buffers": []},
    "unknown": {"parameters": ["input_layernorm.weight", "mixer.A"], "buffers": []},
}


def wire_after_clearance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every sync's weights, for samplers that keep this or that: two before the driver allows training, two after."""
    from fp16_patch.runtime.preflight import allow_training

    facts: dict[str, Any] = {}
    merged = () if arguments.strategy == "veomni" else (("merged", 4),)  # it trains no adapters
    for name, lora_rank in (*((name, 0) for name in KEEPS), *merged):
        learner = Learner(arguments, lora_rank=lora_rank)
        for _ in range(2):  # the learning rate of the first step of a warm-up is 0
            learner.step()
        before = [sync(learner) for _ in range(2)]
        allow_training(None, sampler_keeps=KEEPS.get(name, KEEPS["nothing"]))
        facts[name] = {"before": before, "after": [sync(learner) for _ in range(2)]}
        allow_training(None, sampler_keeps=None)
    return facts


def sync(learner: Learner) -> dict[str, Any]:
    """What one sync sends: dtype by name, bytes, what the all-gathers move, a digest of all of it rounded to FP16."""
    weights, _ = learner.engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    with Gathers() as gathers:
        sent = dict(weights)
    return {
        "dtypes": {name: dtype_name(weight.dtype) for name, weight in sent.items()},
        "bytes": sum(weight.nbytes for weight in sent.values()),
        "gathered": sorted(gathers.dtypes),
        "rounded": digest(torch.cat([weight.half().flatten() for weight in sent.values()])),
    }


class Gathers(TorchDispatchMode):
    """The dtypes that all-gathers move."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_gather" in str(func):
            self.dtypes.add(dtype_name(args[0].dtype))
        return func(*args, **(kwargs or {}))


def oracle(arguments: argparse.Namespace) -> dict[str, float]:
    """Two steps from one seed, on policy: norm of the second one's gradient, and how far it took the parameters.

    The tokens, advantages and the loss are those of `legacy_learner`, as every release is to give the same.
    """
    learner = Learner(arguments)
    learner.worker.set_loss_fn(policy_gradient_loss)
    learner.step(data=on_policy_batch())  # the learning rate of the first step of a warm-up is 0
    before = learner.parameters()
    norm = learner.step(data=on_policy_batch())["grad_norm"]
    moved = (learner.parameters() - before).double().square().sum()
    dist.all_reduce(moved)
    return {"grad_norm": float(torch.tensor(norm).max()), "moved": float(moved.sqrt())}


def policy_gradient_loss(model_output: dict[str, Any], data: TensorDict, dp_group: Any) -> tuple[torch.Tensor, dict]:
    """The mean over the tokens of a rank's responses, of which a micro-batch adds its part."""
    scored = model_output["log_probs"].values().view(-1, TOKENS)[:, PROMPT - 1 : -1]
    advantages = data["advantages"].values().view(-1, RESPONSE)
    return -(scored.float() * advantages).sum() / (SEQUENCES * RESPONSE), {}


def on_policy_batch() -> TensorDict:
    generator = torch.Generator().manual_seed(dist.get_rank())
    input_ids = torch.randint(2, 90, (SEQUENCES, TOKENS), generator=generator)
    advantages = 1.0 + torch.randn(SEQUENCES, RESPONSE, generator=generator).abs()
    return as_batch(list(input_ids), advantages=list(advantages))


def merged_lora_wire(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merged LoRA weights as the sampler gets them, against the FP32 merge."""
    learner = Learner(arguments, lora_rank=4)
    for _ in range(3):  # half of each adapter is 0 at first, and so is the learning rate
        learner.step()
    sent, _ = learner.engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    worst, adapted, dtypes = 0.0, 0.0, set()
    exact, base = fp32_merge(learner, 2.0), fp32_merge(learner, 0.0)  # alpha is twice the rank
    for name, weight in sent:
        dtypes.add(dtype_name(weight.dtype))
        if "q_proj.weight" in name:
            worst = max(worst, relative_error(weight, exact[name]))
            adapted = max(adapted, relative_error(base[name], exact[name]))
    return {"dtypes": sorted(dtypes), "largest_relative_error": worst, "adapted": adapted}


def relative_error(weight: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((weight.float() - reference).abs() / reference.abs().clamp(min=1e-3)).max())


def fp32_merge(learner: Learner, scaling: float) -> dict[str, torch.Tensor]:
    """The same merge in FP32, computed here from base and adapter."""
    state = {name: full(value) for name, value in learner.engine.module.state_dict().items()}
    merged = {}
    for name, base in state.items():
        if not name.endswith("q_proj.base_layer.weight"):
            continue
        stem = name.removesuffix("base_layer.weight")
        a, b = state[f"{stem}lora_A.default.weight"], state[f"{stem}lora_B.default.weight"]
        merged[stem.replace("base_model.model.", "") + "weight"] = base + scaling * (b @ a)
    return merged


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().float() if isinstance(tensor, DTensor) else tensor.float()


def kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two steps with the kernel that the learner takes by itself and with torch's many-tensor one."""
    chosen = {"default": None, "foreach": {"foreach": True}}
    learners = {name: Learner(arguments, optimizer=kernel) for name, kernel in chosen.items()}
    found = {name: two_counted_steps(learner) for name, learner in learners.items()}
    apart = (found["default"].pop("parameters") - found["foreach"].pop("parameters")).abs().max()
    infinite = {name: infinite_norm(learner) for name, learner in learners.items()}
    return {**found, "apart": float(apart), "infinite_norm": infinite}


def infinite_norm(learner: Learner) -> dict[str, Any]:
    """A step of finite gradients, the norm of which is not."""
    before, scale_before = learner.state(), scale(learner)
    learner.engine.optimizer_zero_grad()
    for parameter in learner.engine.module.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    norm = learner.engine.optimizer_step()
    unchanged = on_every_rank(torch.equal(before, learner.state()))
    return {"norm": str(norm), "unchanged_on_every_rank": unchanged, "halved": scale_before / scale(learner)}


def vast_norm(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step of finite gradients, the norm of which is not, on the kernel that the engine takes."""
    learner = Learner(arguments)
    learner.step()
    return infinite_norm(learner)


def several_optimizers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps with VeOmni's container of optimizers, which it makes for experts on ranks of their own.

    The experts' kernels, and Muon, for which it makes one, too, need a GPU: here both parts are Adam's.
    """
    from veomni.optim.optimizer import MultiOptimizer

    learner = Learner(arguments)
    engine, parts = learner.engine, {"matrices": [], "vectors": []}
    for parameter in engine.module.parameters():
        parts["matrices" if parameter.ndim > 1 else "vectors"].append(parameter)
    engine.optimizer = MultiOptimizer(
        engine.module, {name: torch.optim.AdamW(part, lr=1e-3) for name, part in parts.items()}, list(parts)
    )
    steps = [learner.step()]
    before = learner.parameters()
    steps.append(learner.step(poisoned={dist.get_world_size() - 1}))
    after = learner.parameters()
    steps.append(learner.step())
    return {
        "optimizers": len(engine.optimizer),
        "unchanged_on_every_rank": on_every_rank(torch.equal(before, after)),
        "moved_by_a_clean_step": on_every_rank(not torch.equal(after, learner.parameters())),
        "metrics": [plain(step) for step in steps],
    }


def two_counted_steps(learner: Learner) -> dict[str, Any]:
    """Passes over the gradients in each optimizer step, norms, and what became of the parameters."""
    take, counts = learner.engine.optimizer_step, []

    def counted_step() -> float:
        with GradientPasses(learner.engine.module.parameters()) as counted:
            norm = take()
        counts.append(counted.passes)
        return norm

    learner.engine.optimizer_step = counted_step
    norms = [learner.step()["grad_norm"] for _ in range(2)]
    learner.engine.optimizer_step = take
    return {"passes": counts, "norms": norms, "parameters": learner.parameters()}


def fused_chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step with the fused kernel that the configuration asks for: the error, if it fails."""
    learner = Learner(arguments, optimizer={"fused": True})
    try:
        learner.step()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def exports(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `hf_model` folder of a checkpoint: what its label says and what it holds."""
    folder = Path(arguments.out) / "checkpoint" / "huggingface"
    return folder_facts(folder) if list(folder.glob("*.safetensors")) else {}


def temperature(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-probs at temperatures below 1, against exact arithmetic on the very logits the model returned."""
    learner = Learner(arguments, forward_only=True)
    logits: list[torch.Tensor] = []
    handle = learner.engine.module.register_forward_hook(lambda _module, _inputs, output: logits.append(output.logits))
    facts = {}
    for value in (0.7, 0.0):
        logits.clear()
        scored = [log_probs_at(value, packed, learner) for packed in (True, False)]
        errors = [error_of(one, from_model, value) for one, from_model in zip(scored, logits, strict=True)]
        facts[str(value)] = {
            "finite": all(bool(one.isfinite().all()) for one in scored),
            "logits": sorted({dtype_name(one.dtype) for one in logits}),
            "largest_error": max(errors),
        }
    handle.remove()
    return facts


def log_probs_at(value: float, packed: bool, learner: Learner) -> torch.Tensor:
    """What the engine gives for one batch, shape (sequences, tokens); packed into one row, or each in its own."""
    data = batch()
    tu.assign_non_tensor(data, temperature=value, use_remove_padding=packed, calculate_entropy=False)
    tu.assign_non_tensor(data, compute_loss=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=SEQUENCES)
    with learner.engine.eval_mode():
        return learner.engine.infer_batch(data)["model_output"]["log_probs"].values().view(SEQUENCES, TOKENS)


def error_of(log_probs: torch.Tensor, logits: torch.Tensor, temperature: float) -> float:
    """The largest difference to float64 arithmetic; a row's last entry is of a token of the next row, and left out."""
    exact = (logits.view(SEQUENCES, TOKENS, -1)[:, :-1].double() / max(temperature, 1e-8)).log_softmax(-1)
    targets = torch.stack(list(batch()["input_ids"].unbind()))[:, 1:]
    difference = log_probs[:, :-1].double() - exact.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return float(difference.abs().max())


def accumulation(arguments: argparse.Namespace) -> dict[str, Any]:
    """The dtype in which gradients of micro-batches add up when communication is deferred to the last one."""
    # A setting since 0.9.1; 0.9.0 always defers.
    deferred = {"use_no_sync_for_gradient_accumulation": True}
    learner = Learner(arguments, engine={**STOCK_FP16, **(deferred if has_field(*deferred) else {})})
    seen: set[str] = set()
    original = learner.engine.forward_step

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        seen.update(dtype_name(p.grad.dtype) for p in learner.engine.module.parameters() if p.grad is not None)
        seen.update(
            dtype_name(p._saved_grad_shard.dtype)
            for p in learner.engine.module.parameters()
            if getattr(p, "_saved_grad_shard", None) is not None
        )
        return original(*args, **kwargs)

    learner.engine.forward_step = forward_step
    learner.step()
    return {"dtypes": sorted(seen)}


def has_field(name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(FSDPEngineConfig)}


def scaler_facts(learner: Learner) -> dict[str, Any]:
    state = learner.engine.scaler.state_dict()
    return {"scale": state.get("scale"), "growth": state.get("_growth_tracker")}


def scale(learner: Learner) -> float:
    return float(learner.engine.scaler.get_scale())


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name.startswith("fp16/") or name in ("grad_norm", "lr")}


def on_every_rank(fact: bool) -> bool:
    return sum_over_ranks(int(fact)) == dist.get_world_size()


def sum_over_ranks(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


SCENARIOS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        compute_dtypes,
        rope,
        overflow_on_one_rank,
        averaged_norm,
        resume,
        exports,
        resume_from_stock,
        endless_overflow,
        wire,
        wire_after_clearance,
        oracle,
        merged_lora_wire,
        accumulation,
        temperature,
        retried,
        first_scale,
        lost,
        infinite_loss,
        alone,
        kernels,
        vast_norm,
        several_optimizers,
        fused_chosen,
        grown,
        underflow,
    )
}


def seeded(scenario: Callable[..., dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What it finds with the same random numbers whatever ran before it: adapters are drawn from them."""
    torch.manual_seed(0)
    return scenario(arguments)


def main() -> None:
    dist.init_process_group("gloo")
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=("fsdp", "fsdp2", "veomni"), required=True)
    parser.add_argument("--model", required=True)
    # VeOmni draws a head that is not stored as a DTensor, which torch does on GPUs only.
    parser.add_argument("--value-model")
    parser.add_argument("--out", required=True)
    # Stock verl builds its scaler for CUDA. Some of its defects show only where that scaler works, as it does on a GPU.
    parser.add_argument("--working-scaler", action="store_true")
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    arguments = parser.parse_args()
    if arguments.working_scaler:
        defaults = ShardedGradScaler.__init__.__defaults__
        ShardedGradScaler.__init__.__defaults__ = ("cpu", *defaults[1:])
    # A rank that fails ends the others: nothing here waits for a collective it will not join.
    facts = {name: seeded(SCENARIOS[name], arguments) for name in arguments.scenarios}
    if dist.get_rank() == 0:
        Path(arguments.out, "facts.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
