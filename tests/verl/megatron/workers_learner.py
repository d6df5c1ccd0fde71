"""verl's Megatron workers, before 0.8.0, on gloo ranks, put through what FP16 training meets; leaves one JSON of facts.

Started by `tests.ranks`; see `test_workers.py`. Nothing here looks at fp16_patch: the same facts are taken from stock
verl and from verl under a plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# verl 0.5.0 has no setting that imports them, and they come before it.
import megatron_on_cpu  # noqa: F401
import torch
import torch.distributed as dist
import verl_on_cpu  # noqa: F401
from hydra import compose, initialize_config_module
from megatron.core import parallel_state
from megatron_on_cpu import cuda
from megatron_on_cpu.workers import install_cuda_once
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version
from verl import DataProto
from verl.trainer.config import algorithm  # noqa: F401, hydra finds its schemas
from verl.workers import megatron_workers

sys.path.insert(0, str(Path(__file__).parents[3]))

from integration.cpu.launch import MEGATRON_TRANSFORMER_CONFIG

SEQUENCES, PROMPT, RESPONSE = 4, 4, 8
ROLES = ("actor", "critic")
LAYOUTS: dict[str, dict[str, int]] = {
    "dp": {},
    "tp": {"tensor_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
}


class Learner:
    """A worker that trains an actor or a critic, or scores as a reference; its gradients can be made to overflow."""

    def __init__(self, arguments: argparse.Namespace, layout: str, role: str = "actor", *settings: str) -> None:
        torch.manual_seed(0)
        self.role = role
        config = worker_config(arguments, layout, *settings)
        if role == "critic":
            self.worker = megatron_workers.CriticWorker(config=as_critic_config(config.critic))
        else:
            self.worker = megatron_workers.ActorRolloutRefWorker(config=config.actor_rollout_ref, role=role)
        # Not every release divides by the data-parallel ranks what it was given.
        for section in (self.worker.config, self.worker.config.get("actor", None)):
            if section is not None and "ppo_mini_batch_size" in section:
                section.ppo_mini_batch_size = SEQUENCES
        self.worker.init_model()

    @property
    def chunks(self) -> Any:
        return getattr(self.worker, f"{self.role}_module")

    @property
    def optimizer(self) -> Any:
        return getattr(self.worker, f"{self.role}_optimizer")

    def step(self) -> dict[str, Any]:
        """One update of one mini-batch; metrics as this rank has them."""
        data = batch()
        if self.role == "actor":
            data.batch["old_log_probs"] = self.score().float()
        else:
            data.batch["values"] = self.score().float()
            data.batch["returns"] = data.batch["values"] + data.batch["advantages"]
        update = self.worker.update_critic if self.role == "critic" else self.worker.update_actor
        return dict(update(data).meta_info["metrics"])

    def score(self) -> torch.Tensor:
        """Log-probs or values of the batch's responses, as the driver gets them."""
        if self.role == "critic":
            return self.worker.compute_values(batch()).batch["values"]
        if self.role == "ref":
            return self.worker.compute_ref_log_prob(batch()).batch["ref_log_prob"]
        return self.worker.compute_log_prob(batch()).batch["old_log_probs"]

    @contextmanager
    def overflowing(self, rank: int) -> Iterator[None]:
        """Make one gradient on one rank infinite."""
        *_, victim = (p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)

        def overflow(gradient: torch.Tensor) -> torch.Tensor:
            return torch.full_like(gradient, float("inf")) if dist.get_rank() == rank else gradient

        handle = victim.register_hook(overflow)
        try:
            yield
        finally:
            handle.remove()

    def parameters(self) -> torch.Tensor:
        """This rank's parameters, one after the other."""
        return torch.cat([p.detach().float().flatten() for chunk in self.chunks for p in chunk.parameters()])

    def parts(self) -> list[Any]:
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def scales(self) -> list[float]:
        return [float(part.grad_scaler.scale) for part in self.parts() if part.grad_scaler is not None]

    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def worker_config(arguments: argparse.Namespace, layout: str, *more: str) -> DictConfig:
    """The configuration that verl's command line makes of these settings."""
    models = ("actor_rollout_ref.model", "critic.model")
    settings = [
        *(f"{model}.path={arguments.model}" for model in models),
        f"critic.model.tokenizer_path={arguments.model}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.free_cache_engine=false",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
    ]
    for role in ("actor_rollout_ref.actor", "critic"):
        settings += [
            f"{role}.ppo_mini_batch_size={SEQUENCES * dist.get_world_size()}",
            f"{role}.ppo_micro_batch_size_per_gpu=2",
            f"{role}.optim.lr=1e-3",
            f"++{role}.optim.lr_warmup_steps=4",
            f"{role}.optim.weight_decay=0.0",
            f"++{role}.optim.total_training_steps=100",
        ]
    for role in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic"):
        of_a_role = {"use_mbridge": True, **LAYOUTS[layout]}
        of_a_role |= {f"override_transformer_config.{key}": value for key, value in MEGATRON_TRANSFORMER_CONFIG.items()}
        settings += [f"++{role}.megatron.{key}={value}" for key, value in of_a_role.items()]
        if arguments.fp16:
            settings.append(f"++{role}.megatron.dtype=float16")
    config = compose("ppo_megatron_trainer", overrides=[*settings, *more])
    OmegaConf.resolve(config)
    # As the trainer hands it on.
    OmegaConf.set_struct(config, False)
    return config


def as_critic_config(section: DictConfig) -> Any:
    """What the trainer hands a critic worker: a dataclass, but in 0.5.0."""
    if find_spec("verl.workers.config") is None:
        return section
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(section)


def batch() -> DataProto:
    """Sequences that are the same on all ranks that share a mini-batch."""
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    tokens = PROMPT + RESPONSE
    input_ids = torch.randint(2, 90, (SEQUENCES, tokens), generator=generator)
    mask = torch.ones(SEQUENCES, tokens, dtype=torch.int64)
    tensors = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).repeat(SEQUENCES, 1),
        "prompts": input_ids[:, :PROMPT],
        "responses": input_ids[:, PROMPT:],
        "response_mask": mask[:, PROMPT:],
        "advantages": 1.0 + torch.randn(SEQUENCES, RESPONSE, generator=generator).abs(),
    }
    meta = {"temperature": 1.0, "global_token_num": [tokens] * SEQUENCES, "micro_batch_size": 2}
    return DataProto.from_dict(tensors=tensors, meta_info=meta)


def built(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """For each role what it is built of, and how far its log-probs are from those of transformers in float16."""
    facts: dict[str, Any] = {}
    for role in ("actor", "ref", "critic"):
        learner = Learner(arguments, layout, role)
        parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
        main_grads = [p.main_grad for p in parameters if getattr(p, "main_grad", None) is not None]
        facts[role] = {"parameters": dtypes(parameters), "main_grads": dtypes(main_grads)}
        scored = learner.score()
        if role != "critic":
            facts[role]["log_prob_error"] = max(gathered(log_prob_error(scored, arguments.model)))
    return facts


def log_prob_error(scored: torch.Tensor, model: Any) -> float:
    """The largest |difference| of these log-probs to those of transformers in float16."""
    from transformers import AutoModelForCausalLM

    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float16).eval()
    ids = batch().batch["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits.float()[:, PROMPT - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
    return float((scored.float() - expected).abs().max())


def overflow_on_one_rank(arguments: argparse.Namespace, layout: str) -> dict[str, Any]:
    """For each role two clean steps, one with an infinite gradient on the last rank only, and a clean one.

    The learning rate of the first is 0.
    """
    facts: dict[str, Any] = {}
    for role in ROLES:
        learner = Learner(arguments, layout, role)
        first = [learner.step() for _ in range(2)][-1]
        before, lr_before = learner.parameters(), learner.lr()
        with learner.overflowing(dist.get_world_size() - 1):
            error, overflow = tried(learner.step)
        after, lr_after, scales = learner.parameters(), learner.lr(), learner.scales()
        last = learner.step() if error is None else {}
        facts[role] = {
            "errors": gathered(error),
            "metrics": [of_a_rank(metrics) for metrics in (first, overflow, last)],
            "unchanged_on_every_rank": all(gathered(torch.equal(before, after))),
            "moved_by_a_clean_step": all(gathered(not torch.equal(after, learner.parameters()))),
            "lr": [lr_before, lr_after, learner.lr()],
            "scales": sorted({scale for own in gathered(scales) for scale in own}),
        }
    return facts


def tried(call: Callable[[], Any]) -> tuple[str | None, Any]:
    """Return what a call ended with: the name of its error and what it says, or what it returned."""
    try:
        return None, call()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:500], {}


def wire(arguments: argparse.Namespace, layout: str) -> dict[str, Any] | None:
    """Weights as the sampler gets them after two steps: transformers scores by them what the learner scores."""
    learner = Learner(arguments, layout)
    if not hasattr(learner.worker, "rollout_mode"):
        return None
    for _ in range(2):
        learner.step()
    sent = weights_sent_by(learner.worker)
    return {
        "dtypes": dtypes(sent.values()),
        "log_prob_error": max(gathered(log_prob_error(learner.score(), loaded(arguments.model, sent)))),
    }


def weights_sent_by(worker: Any) -> dict[str, torch.Tensor]:
    """What `rollout_mode` gives to a sampler; the sampler here keeps it."""
    sent: dict[str, torch.Tensor] = {}

    class Sampler:
        sleep_level = 1

        async def resume(self, tags: list[str]) -> None:
            pass

        async def update_weights(self, weights: Any, **_kwargs: Any) -> None:
            sent.update((name, weight.detach().clone()) for name, weight in weights)

    worker.rollout = Sampler()
    worker.gen_random_states = torch.get_rng_state()
    asyncio.run(worker.rollout_mode())
    return sent


def loaded(path: str, weights: dict[str, torch.Tensor]) -> Any:
    """A model of transformers with these weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), torch_dtype=torch.float16).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def resumed(arguments: argparse.Namespace, layout: str) -> dict[str, Any] | None:
    """For each role an overflow and two steps, saved; then what a worker that is built anew goes on with."""
    if Version(version("verl")) < Version("0.7.1"):
        return None
    facts: dict[str, Any] = {}
    for role in ROLES:
        learner = Learner(arguments, layout, role)
        with learner.overflowing(0):
            tried(learner.step)
        for _ in range(2):
            learner.step()
        path = str(Path(arguments.out) / f"checkpoint_{layout}_{role}")
        learner.worker.save_checkpoint(path)
        fresh = Learner(arguments, layout, role)
        error, _ = tried(partial(fresh.worker.load_checkpoint, path, del_local_after_load=False))
        facts[role] = {"errors": gathered(error)}
        if error is None:
            same = torch.equal(learner.parameters(), fresh.parameters())
            facts[role] |= {"saved": facts_of(learner), "resumed": facts_of(fresh), "same": all(gathered(same))}
            norms = [of_a_rank(each.step())[f"{role}/grad_norm"] for each in (learner, fresh)]
            same = torch.equal(learner.parameters(), fresh.parameters())
            facts[role] |= {"norms": norms, "same_next": all(gathered(same))}
    return facts


def facts_of(learner: Learner) -> dict[str, Any]:
    scales = sorted({scale for own in gathered(learner.scales()) for scale in own})
    return {"scales": scales, "growth": learner.parts()[0].grad_scaler._growth_tracker, "lr": learner.lr()}


def dtypes(tensors: Any) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def gathered(fact: Any) -> list[Any]:
    """Every rank's."""
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


def of_a_rank(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """The metrics of the last rank, which is in the last stage of a pipeline."""
    found: dict[str, Any] = gathered(metrics)[-1]
    numbers = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: list(map(float, value)) for name, value in numbers.items() if "norm" in name or "fp16" in name}


SCENARIOS: dict[str, Callable[[argparse.Namespace, str], dict[str, Any] | None]] = {
    scenario.__name__: scenario for scenario in (built, overflow_on_one_rank, wire, resumed)
}


def main() -> None:
    dist.init_process_group("gloo")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--fp16", action="store_true", help="as verl documents it, since 0.6.1")
    parser.add_argument("--import", dest="module", help="imported before a worker is made")
    parser.add_argument("cells", nargs="+", metavar="LAYOUT:SCENARIO,…")
    arguments = parser.parse_args()
    if arguments.module:
        import_module(arguments.module)
    install_cuda_once()
    facts: dict[str, Any] = {}
    # A rank that fails ends the others: nothing here waits for a collective it will not join.
    with initialize_config_module("verl.trainer.config", version_base=None):
        for cell in arguments.cells:
            layout, _, scenarios = cell.partition(":")
            with cuda.CudaIsCpu():
                parallel_state.initialize_model_parallel(**LAYOUTS[layout])
            for name in scenarios.split(","):
                started = time.monotonic()
                facts.setdefault(layout, {})[name] = SCENARIOS[name](arguments, layout)
                facts[layout].setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
            parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(arguments.out, "facts.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
