"""verl's Megatron learner on gloo ranks, put through what FP16 training meets; leaves one JSON of facts.

Started by `tests.ranks`; see `test_learner.py`. Nothing here looks at fp16_patch, or tells it more than the driver of a
run would: the same facts are taken from stock verl and from verl under a plan. One process goes through several layouts
of its ranks, one after the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))

from megatron.core import parallel_state
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.config.engine import TrainingWorkerConfig
from verl.workers.config.model import MtpConfig
from verl.workers.engine.megatron import transformer_impl
from verl.workers.engine_workers import TrainingWorker

from integration.cpu.launch import MEGATRON_TRANSFORMER_CONFIG
from tests.verl.learner import digest, dtype_name, gathered, on_every_rank, plain

SEQUENCES, TOKENS = 4, 12
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tensor_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "ep": {"expert_model_parallel_size": 2},
    "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
}
MIXTURES = ("ep",)
"""Layouts of a mixture of experts, whatever the options."""
OPTIONS = {
    "mixture": "a mixture of experts",
    "bridged": "on Megatron-Bridge",
    "offload": "parameters and optimizer on the host between calls",
    "value_model": "a head of one output, as a critic's",
    "lora": "adapters are trained alone",
    "mtp": "a head predicts one token more, and is trained, too",
}
OFFLOADED = {"param_offload": True, "optimizer_offload": True}
TOO_HIGH = 2.0**21
"""A mean over few tokens has finite gradients some halvings below it."""
LOW = 2.0**5
"""Far below what is measured of these gradients."""
STEEP = 2.0**6
"""Makes gradients overflow at 65536."""
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
ADAPTERS = {"type": "lora", "rank": 4, "alpha": 8}
BALANCED = {"moe_router_score_function": "sigmoid", "moe_router_bias_update_rate": 1e-2}


class Learner:
    """One `TrainingWorker`, whose gradients can be made to overflow on chosen ranks."""

    def __init__(self, arguments: argparse.Namespace, layout: str, **settings: Any) -> None:
        self.factor = 1.0
        if arguments.value_model:
            settings = {"model_type": "value_model", **settings}
        self.worker = TrainingWorker(worker_config(arguments, layout, **settings))
        self.worker.reset()
        self.worker.set_loss_fn(self.loss)
        self.engine = self.worker.engine
        self.computed = 0

    def loss(self, model_output: dict[str, Any], data: TensorDict, dp_group: Any) -> tuple[torch.Tensor, dict]:
        output = model_output["log_probs"] if "log_probs" in model_output else model_output["values"]
        self.computed += 1
        return -output.values().float().mean() * self.factor, {}

    def batch(self, seed: int = 0) -> TensorDict:
        """Sequences of different lengths, the same on all ranks that share a mini-batch."""
        generator = torch.Generator().manual_seed(100 * seed + self.engine.get_data_parallel_rank())
        lengths = [TOKENS - number % 3 for number in range(SEQUENCES)]
        data = rows_as_batch([torch.randint(2, 90, (length,), generator=generator) for length in lengths])
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=[TOKENS] * SEQUENCES)
        tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
        return data

    def step(self, seed: int = 0) -> dict[str, Any]:
        """One optimizer step, and the metrics that the driver gets from it; only some ranks have them."""
        found = self.worker.train_batch(self.batch(seed))
        return {} if found is None else dict(tu.get(found, "metrics"))

    def log_probs(self) -> list[torch.Tensor] | None:
        """FP32 log-probs of the first batch, by sequence; None on ranks that have no output."""
        found = self.outputs("log_probs")
        return None if found is None else [row[:-1] for row in found]

    def outputs(self, name: str) -> list[torch.Tensor] | None:
        with self.engine.eval_mode():
            output = self.engine.infer_batch(self.batch())
        if "model_output" not in output or not self.engine.is_mp_src_rank_with_outputs():
            return None
        return [row.float() for row in output["model_output"][name].unbind()]

    @contextmanager
    def overflowing(self, rank: int, always: bool = False) -> Iterator[None]:
        """Make one gradient on one rank infinite, at the scale in force and above it: an expert's, if there are any.

        Args:
            always: below it, too.
        """
        named = [pair for chunk in self.engine.module for pair in chunk.named_parameters() if pair[1].requires_grad]
        experts = [parameter for name, parameter in named if ".experts." in name]
        victim = experts[-1] if experts else named[-1][1]
        too_high = self.scales()[0]

        def overflow(gradient: torch.Tensor) -> torch.Tensor:
            fits = dist.get_rank() != rank or (self.scales()[0] < too_high and not always)
            return gradient if fits else torch.full_like(gradient, float("inf"))

        handle = victim.register_hook(overflow)
        try:
            yield
        finally:
            handle.remove()

    def parameters(self) -> torch.Tensor:
        """This rank's parameters, one after the other; with the optimizer they come back from the host."""
        if self.engine.is_param_offload_enabled:
            self.engine.to(transformer_impl.get_device_name())
        parameters = (parameter for chunk in self.engine.module for parameter in chunk.parameters())
        return torch.cat([parameter.detach().float().flatten() for parameter in parameters])

    def state(self) -> torch.Tensor:
        """Parameters, and this rank's part of masters and moments."""
        parameters = self.parameters()
        kept = [
            value.detach().float().flatten()
            for part in self.parts()
            for state in part.optimizer.state.values()
            for _, value in sorted(state.items())
            if isinstance(value, torch.Tensor)
        ]
        return torch.cat([parameters, *kept])

    def parts(self) -> list[Any]:
        return list(getattr(self.engine.optimizer, "chained_optimizers", [self.engine.optimizer]))

    def scales(self) -> list[float]:
        return [float(part.grad_scaler.scale) for part in self.parts()]

    def start_at(self, scale: float) -> None:
        for part in self.parts():
            part.grad_scaler._scale.fill_(scale)

    def lr(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def random(self) -> torch.Tensor:
        """The states of all generators of this process."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        states = get_cuda_rng_tracker().get_states()
        return torch.cat([torch.get_rng_state(), *(states[name] for name in sorted(states))])


def worker_config(
    arguments: argparse.Namespace,
    layout: str,
    *,
    model_type: str = "language_model",
    forward_only: bool = False,
    engine: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> TrainingWorkerConfig:
    parallel = {"vanilla_mbridge": not arguments.bridged, **LAYOUTS[layout], **(engine or {})}
    if arguments.offload:
        parallel = {**OFFLOADED, **parallel}
    heads: dict[str, Any] = {}
    if arguments.mtp:
        # The bridge reads the model's own configuration, which has no such head.
        transformer = {"mtp_num_layers": 1, **(transformer or {})}
        heads = {
            "mtp": MtpConfig(enable=True, enable_train=True),
            "override_config": {"num_nextn_predict_layers": 1},
        }
    adapters = {"lora": {**ADAPTERS, "merge": True}} if arguments.lora else {}
    return TrainingWorkerConfig(
        model_type=model_type,
        model_config=HFModelConfig(
            path=model_of(arguments, layout), enable_gradient_checkpointing=False, **adapters, **heads
        ),
        engine_config=McoreEngineConfig(
            forward_only=forward_only,
            dtype="float16",
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=2,
            infer_micro_batch_size_per_gpu=2,
            use_fused_kernels=False,
            override_transformer_config={**MEGATRON_TRANSFORMER_CONFIG, **(transformer or {})},
            **parallel,
        ),
        optimizer_config=McoreOptimizerConfig(
            lr=1e-3,
            lr_warmup_steps=4,
            total_training_steps=100,
            weight_decay=0.0,
            clip_grad=1.0,
            use_checkpoint_opt_param_scheduler=True,
            override_optimizer_config=optimizer or {},
        ),
        checkpoint_config=CheckpointConfig(
            save_contents=["model", "optimizer", "extra"], load_contents=["model", "optimizer", "extra"]
        ),
    )


def model_of(arguments: argparse.Namespace, layout: str) -> str:
    return str(arguments.mixture_model if layout in MIXTURES or arguments.mixture else arguments.model)


def has_experts(path: str) -> bool:
    return "moe_intermediate_size" in json.loads(Path(path, "config.json").read_text())


def rows_as_batch(rows: list[torch.Tensor]) -> TensorDict:
    nested = {
        "input_ids": rows,
        "position_ids": [torch.arange(len(row)) for row in rows],
        "loss_mask": [torch.ones(len(row), dtype=torch.int64) for row in rows],
    }
    tensors = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in nested.items()}
    return tu.get_tensordict(tensors, non_tensor_dict={"temperature": 1.0})


def built(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Dtypes of what was built, and how far log-probs are from those of transformers in the same dtype."""
    learner = Learner(arguments, layout)
    parameters = [parameter for chunk in learner.engine.module for parameter in chunk.parameters()]
    return {
        "parameters": dtypes(parameters),
        "main_grads": dtypes(parameter.main_grad for parameter in parameters if parameter.requires_grad),
        **errors_of(learner, model_of(arguments, layout)),
    }


def errors_of(learner: Learner, path: str) -> dict[str, float]:
    """How far what the learner computes is from transformers."""
    if learner.engine.is_value_model:
        return {"value_error": largest(value_error(learner, path))}
    return {"log_prob_error": largest(log_prob_error(learner, path))}


def reference(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """What is built without an optimizer, and its log-probs."""
    learner = Learner(arguments, layout, forward_only=True)
    return {
        "parameters": dtypes(parameter for chunk in learner.engine.module for parameter in chunk.parameters()),
        "log_prob_error": largest(log_prob_error(learner, model_of(arguments, layout))),
    }


def value_error(learner: Learner, path: str) -> float:
    """The largest |difference| of this rank's values to those of transformers' layers in float16 under the same head.

    The head is the learner's: it has one output, and the bridges do not read it of every checkpoint.
    """
    from transformers import AutoModel

    found = learner.outputs("values")
    if found is None:
        return 0.0
    head = next(p for name, p in learner.engine.module[-1].named_parameters() if "output_layer.weight" in name)
    body = AutoModel.from_pretrained(path, dtype=torch.float16).eval()
    errors = []
    for row, values in zip(learner.batch()["input_ids"].unbind(), found, strict=True):
        with torch.no_grad():
            expected = (body(row[None]).last_hidden_state[0].float() @ head.float().T)[:, 0]
        errors.append((expected - values).abs().max().item())
    return max(errors)


def log_prob_error(learner: Learner, model: Any) -> float:
    """The largest |difference| of this rank's log-probs to those of transformers in float16; 0 where it has none."""
    from transformers import AutoModelForCausalLM

    found = learner.log_probs()
    if found is None:
        return 0.0
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).eval() if isinstance(model, str) else model
    errors = []
    for row, log_probs in zip(learner.batch()["input_ids"].unbind(), found, strict=True):
        with torch.no_grad():
            logits = hf(row[None]).logits[0].float()
        errors.append((logits.log_softmax(-1)[:-1].gather(-1, row[1:, None])[:, 0] - log_probs).abs().max().item())
    return max(errors)


def dtypes(tensors: Any) -> list[str]:
    return sorted({dtype_name(tensor.dtype) for tensor in tensors})


def largest(own: float) -> float:
    return max(gathered(own))


def overflow_on_one_rank(arguments: argparse.Namespace, layout: str, always: bool = False) -> dict[str, Any]:
    """For each rank asked for: a clean step, one with an infinite gradient on that rank only, and a clean one.

    Args:
        always: it is infinite at every scale.
    """
    facts: dict[str, Any] = {}
    for rank in overflowing_ranks(arguments):
        learner = Learner(arguments, layout)
        clean = learner.step()
        before, lr_before = learner.parameters(), learner.lr()
        with learner.overflowing(rank, always):
            error, overflow = tried(learner.step)
        after, lr_after, scales = learner.parameters(), learner.lr(), learner.scales()
        last = learner.step()
        facts[str(rank)] = {
            "errors": gathered(error),
            "metrics": [seen_by_driver(metrics) for metrics in (clean, overflow, last)],
            "unchanged_on_every_rank": on_every_rank(torch.equal(before, after)),
            "moved_by_a_clean_step": on_every_rank(not torch.equal(after, learner.parameters())),
            "lr": [lr_before, lr_after, learner.lr()],
            "scales": sorted({scale for own in gathered(scales) for scale in own}),
        }
    return facts


def overflowing_ranks(arguments: argparse.Namespace) -> range:
    """The ranks on which a gradient overflows, one after the other."""
    world = dist.get_world_size()
    return range(world - 1 if arguments.last_rank else 0, world)


def tried(step: Callable[[], dict[str, Any]]) -> tuple[str | None, dict[str, Any]]:
    """Return what a step ended with: the name of its error and what it says, or its metrics."""
    try:
        return None, step()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:500], {}


def seen_by_driver(metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics from the first rank that has some."""
    return next((plain(found) for found in gathered(metrics) if found), {})


def retried(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Three updates with dropout: with a gradient that overflows on one rank, and from far too high a scale.

    Each is of two micro-batches. Beside each run is one from the scale that was found. It has nothing to retry, so it
    says what the first should have come to.
    """
    facts: dict[str, Any] = {}
    starts: dict[str, tuple[float, int | None]] = {
        f"rank {rank}": (1024.0, rank) for rank in overflowing_ranks(arguments)
    }
    if not arguments.last_rank:
        starts["too_high"] = TOO_HIGH, None
    for name, (start, rank) in starts.items():
        found = dropout_run(arguments, layout, start, rank)
        clean = dropout_run(arguments, layout, found["scales"][0])
        same = {key: on_every_rank(found[key] == clean[key]) for key in ("state", "random", "losses", "norms", "lr")}
        facts[name] = {"same": same, "found": found, "clean": clean}
    other = dropout_run(arguments, layout, clean["scales"][0], seed=12)
    facts["dropout_matters"] = other["state"] != clean["state"]
    return facts


def dropout_run(
    arguments: argparse.Namespace, layout: str, start: float, overflowing: int | None = None, seed: int = 11
) -> dict[str, Any]:
    """What three updates leave behind: digests of parameters and optimizer state, and of the generators."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    learner = Learner(
        arguments, layout, transformer={**DROPOUT, **(BALANCED if has_experts(model_of(arguments, layout)) else {})}
    )
    biases = balance(learner)
    learner.start_at(start)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    steps, scales, lr = [], [], []
    for number in range(3):
        with nullcontext() if overflowing is None or number else learner.overflowing(overflowing):
            steps.append(learner.step())
        scales.append(learner.scales()[0])
        lr.append(learner.lr())
    return {
        "state": digest(torch.cat([learner.state(), *biases])),
        "random": digest(learner.random()),
        "losses": gathered([step.get("loss") for step in steps]),
        "norms": gathered([step.get("grad_norm") for step in steps]),
        "metrics": [seen_by_driver(step) for step in steps],
        "scales": scales,
        "lr": lr,
        "computed": max(gathered(learner.computed)),
    }


def balance(learner: Learner) -> list[torch.Tensor]:
    """Give routers a bias an expert, which moves with every computation; mbridge has one for few families."""
    biases = []
    for chunk in learner.engine.module:
        for router in chunk.modules():
            if hasattr(router, "enable_expert_bias"):
                router.enable_expert_bias = router.config.moe_router_enable_expert_bias = True
                for name in ("local_tokens_per_expert", "expert_bias"):
                    delattr(router, name)
                    router.register_buffer(name, torch.zeros(router.config.num_moe_experts))
                biases.append(router.expert_bias)
    return biases


def first_scale(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Two updates of gradients that overflow at 65536, and what the first was seen to be like."""
    learner = Learner(arguments, layout)
    learner.factor = STEEP
    metrics = [seen_by_driver(learner.step(seed)) for seed in range(2)]
    return {"metrics": metrics, "scales": learner.scales(), "computed": max(gathered(learner.computed))}


def grown(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Twenty updates of the same gradients, from three doublings below the largest scale that bears them."""
    learner = Learner(arguments, layout)
    learner.start_at(TOO_HIGH)
    frozen_step(learner)
    bearable = learner.scales()[0]
    learner.start_at(bearable / 8)
    steps = [frozen_step(learner) for _ in range(20)]
    return {"bearable": bearable, "metrics": steps, "scales": sorted(set(gathered(learner.scales()[0])))}


def frozen_step(learner: Learner) -> dict[str, Any]:
    """A step that leaves the parameters as they are."""
    for group in learner.engine.optimizer.param_groups:
        group["lr"] = 0.0
    return seen_by_driver(learner.step())


def endless_overflow(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Steps whose gradients overflow on the last rank at every scale, until the run stops."""
    learner = Learner(arguments, layout)
    learner.step()
    with learner.overflowing(dist.get_world_size() - 1, always=True):
        errors = [None]
        while errors[-1] is None and len(errors) < 100:
            errors.append(tried(learner.step)[0])
    finite = bool(learner.parameters().isfinite().all())
    return {
        "errors": gathered(errors[-1]),
        "attempt": len(errors) - 1,
        "parameters_finite": on_every_rank(finite),
    }


def infinite_loss(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """A step whose loss is infinite: no scale helps."""
    learner = Learner(arguments, layout)
    learner.step()
    learner.factor, learner.computed = float("inf"), 0
    metrics = seen_by_driver(learner.step())
    return {"metrics": metrics, "computed": max(gathered(learner.computed))}


def checked_gradients(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """A step that overflows, where Megatron is told to look for such gradients itself; and one that does not."""
    checks = {"check_for_nan_in_grad": True, "check_for_large_grads": True}
    learner = Learner(arguments, layout, engine={"override_ddp_config": checks})
    learner.start_at(TOO_HIGH)
    error, _ = tried(learner.step)
    return {"errors": gathered(error), "scales": learner.scales()}


def exported(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Weights as the sampler gets them after two steps: transformers scores by them what the learner scores."""
    learner = Learner(arguments, layout)
    for seed in range(2):
        learner.step(seed)
    return weights_facts(learner, model_of(arguments, layout))


def weights_facts(learner: Learner, path: str) -> dict[str, Any]:
    weights = {name: weight.detach().clone() for name, weight in learner.engine.get_per_tensor_param()[0]}
    return {
        "dtypes": dtypes(weights.values()),
        "log_prob_error": largest(log_prob_error(learner, loaded(path, weights))),
    }


def loaded(path: str, weights: dict[str, torch.Tensor]) -> Any:
    """A model of transformers with these weights, read as a checkpoint's: it knows experts by other names."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(Path(path, "config.json"), folder)
        # Tied weights are sent once.
        save_file({name: weight.contiguous() for name, weight in weights.items()}, Path(folder, "model.safetensors"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()


def overlapped(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """The same, where Megatron gathers parameters while the next forward pass runs, and before and after that pass."""
    learner = Learner(
        arguments, layout, engine={"override_ddp_config": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
    )
    for seed in range(2):
        learner.step(seed)
    after_a_step = weights_facts(learner, model_of(arguments, layout))
    return {"after_a_step": after_a_step, "after_a_forward_pass": weights_facts(learner, model_of(arguments, layout))}


def resumed(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """An overflow and two steps, saved; then what a learner that is built anew goes on with, and its next step."""
    learner = Learner(arguments, layout)
    with learner.overflowing(0):
        tried(learner.step)
    for seed in range(2):
        learner.step(seed)
    path = str(Path(arguments.out) / f"checkpoint_{layout}")
    learner.engine.save_checkpoint(path, global_step=3)
    fresh = Learner(arguments, layout)

    def load() -> dict[str, Any]:
        fresh.engine.load_checkpoint(path, del_local_after_load=False)
        return {}

    error, _ = tried(load)
    if error:
        return {"errors": gathered(error)}
    at_load = [facts_of(each) for each in (learner, fresh)]
    same = on_every_rank(torch.equal(learner.state(), fresh.state()))
    others = gathered(sorted(differing(learner, fresh)))
    steps = [seen_by_driver(each.step(9)) for each in (learner, fresh)]
    return {
        "errors": gathered(error),
        "saved": at_load[0],
        "resumed": at_load[1],
        "same_state": same,
        "differing": others,
        "steps": steps,
        "same_next_state": on_every_rank(torch.equal(learner.state(), fresh.state())),
    }


def resumed_alone(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """What a learner goes on with from that which Megatron saves by itself, at a scale that would not be measured."""
    learner = Learner(arguments, layout)
    learner.step()
    learner.start_at(LOW)
    for part in learner.parts():
        part.grad_scaler._growth_tracker = 10**6
    path = Path(arguments.out) / f"alone_{layout}"
    learner.engine.save_checkpoint(str(path), global_step=1)
    dist.barrier()
    if dist.get_rank() == 0:
        for state in path.glob("fp16_patch_*"):
            state.unlink()
    dist.barrier()
    fresh = Learner(arguments, layout)
    fresh.engine.load_checkpoint(str(path), del_local_after_load=False)
    at_load = facts_of(fresh)
    return {"resumed": at_load, "metrics": seen_by_driver(fresh.step(1)), "next": facts_of(fresh)}


def differing(learner: Learner, other: Learner) -> Iterator[str]:
    """The names of this rank's parameters that differ between two learners."""
    for chunk, of_other in zip(learner.engine.module, other.engine.module, strict=True):
        found = dict(of_other.named_parameters())
        yield from (name for name, own in chunk.named_parameters() if not torch.equal(own, found[name]))


def facts_of(learner: Learner) -> dict[str, Any]:
    scaler = learner.parts()[0].grad_scaler
    return {
        "scales": sorted({scale for own in gathered(learner.scales()) for scale in own}),
        "growth": scaler._growth_tracker,
        "lr": learner.lr(),
        "schedule": learner.engine.lr_scheduler.num_steps,
    }


SCENARIOS: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {
    "built": built,
    "reference": reference,
    "overflow_on_one_rank": overflow_on_one_rank,
    "skipped": partial(overflow_on_one_rank, always=True),
    "retried": retried,
    "first_scale": first_scale,
    "grown": grown,
    "endless_overflow": endless_overflow,
    "infinite_loss": infinite_loss,
    "checked_gradients": checked_gradients,
    "exported": exported,
    "overlapped": overlapped,
    "resumed": resumed,
    "resumed_alone": resumed_alone,
}


def main() -> None:
    dist.init_process_group("gloo")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--mixture", dest="mixture_model", help="a mixture of experts")
    parser.add_argument("--last-rank", action="store_true", help="gradients overflow there only, not on each in turn")
    parser.add_argument("--out", required=True)
    parser.add_argument("cells", nargs="+", metavar="LAYOUT[+OPTION…]:SCENARIO,…", help=", ".join(OPTIONS))
    arguments = parser.parse_args()
    facts: dict[str, Any] = {}
    for cell in arguments.cells:
        where, _, scenarios = cell.partition(":")
        layout, *options = where.split("+")
        own = argparse.Namespace(**vars(arguments), **{name: name in options for name in OPTIONS})
        # A rank that fails ends the others: nothing here waits for a collective it will not join.
        for name in scenarios.split(","):
            started = time.monotonic()
            facts.setdefault(where, {})[name] = SCENARIOS[name](own, layout)
            facts[where].setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
            if dist.get_rank() == 0:
                # At once: it may be read at any time.
                Path(arguments.out, "new.json").write_text(json.dumps(facts, indent=1))
                Path(arguments.out, "new.json").replace(Path(arguments.out, "facts.json"))
        parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
