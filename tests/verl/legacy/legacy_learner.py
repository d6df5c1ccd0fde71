"""verl's own workers of before 0.8.0 on gloo ranks, put through what FP16 training meets; leaves one JSON of facts.

Started by `tests.ranks`; see `test_learner.py`. Nothing here looks at fp16_patch: the same facts are
taken from stock verl and from verl under a plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import verl_on_cpu  # noqa: F401, verl 0.5.0 has no setting that imports it
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from verl import DataProto
from verl.trainer.config import algorithm  # noqa: F401, hydra finds its schemas
from verl.workers import fsdp_workers

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.verl.folder import folder_facts

# Large enough to overflow FP16 gradients, small enough for a finite FP32 loss.
OVERFLOWING = 1e30
# Small enough for most FP16 gradients to vanish without a loss scale.
VANISHING = 1e-6
SEQUENCES, PROMPT, RESPONSE = 4, 4, 8
ROLES = ("actor", "critic")
REWARD = ["reward"] if hasattr(fsdp_workers, "RewardModelWorker") else []


class Learner:
    """A worker that trains an actor or a critic, whose gradients can be made to overflow on chosen ranks."""

    def __init__(self, arguments: argparse.Namespace, role: str = "actor", *settings: str) -> None:
        torch.manual_seed(0)
        self.role = role
        config = compose_config(arguments, *settings)
        if role == "critic":
            self.worker = fsdp_workers.CriticWorker(config=as_critic_config(config.critic))
        elif role == "reward":
            self.worker = fsdp_workers.RewardModelWorker(config=config.reward_model)
        else:
            self.worker = fsdp_workers.ActorRolloutRefWorker(config=config.actor_rollout_ref, role=role)
        self.worker.init_model()

    @property
    def learner(self) -> Any:
        """verl's object that does forward, backward and step; a reward model has none."""
        return getattr(self.worker, {"ref": "ref_policy"}.get(self.role, self.role), None)

    @property
    def module(self) -> torch.nn.Module:
        if self.role == "reward":
            return self.worker.reward_module
        return self.learner.critic_module if self.role == "critic" else self.learner.actor_module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.critic_optimizer if self.role == "critic" else self.learner.actor_optimizer

    def update(self, *factors: float) -> dict[str, Any]:
        """One update of as many mini-batches as there are factors of the advantages; metrics as this rank has them."""
        data = batch(SEQUENCES * len(factors))
        advantages = data.batch["advantages"] * torch.tensor(factors).repeat_interleave(SEQUENCES)[:, None]
        data.batch["advantages"] = advantages
        if self.role == "actor":
            # A single mini-batch is on policy, which 0.5.0 does not know by itself.
            data.batch["old_log_probs"] = self.score(len(factors)).float()
        else:
            # So that the gradient of the value loss is linear in the factor.
            data.batch["values"] = self.score(len(factors)).float()
            data.batch["returns"] = data.batch["values"] + 0.1 * advantages
        update = self.worker.update_critic if self.role == "critic" else self.worker.update_actor
        return dict(update(data).meta_info["metrics"])

    def step(self, poisoned: set[int] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        """One optimizer step, with gradients that overflow on some ranks."""
        return self.update(OVERFLOWING if dist.get_rank() in poisoned else 1.0)

    def score(self, batches: int = 1, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs, values or rewards of a batch, as the driver gets them."""
        data = batch(SEQUENCES * batches)
        if self.role == "reward":
            return self.worker.compute_rm_score(data).batch["rm_scores"]
        if self.role == "critic":
            return self.worker.compute_values(data).batch["values"]
        self.worker.config.rollout.temperature = temperature
        if self.role == "ref":
            return self.worker.compute_ref_log_prob(data).batch["ref_log_prob"]
        return self.worker.compute_log_prob(data).batch["old_log_probs"]

    def parameters(self) -> torch.Tensor:
        """All local parameters, one after the other."""
        return torch.cat([local(parameter).detach().flatten().clone() for parameter in self.module.parameters()])

    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def compose_config(arguments: argparse.Namespace, *more: str) -> DictConfig:
    """The configuration that verl's command line makes of these settings."""
    exportable = arguments.strategy == "fsdp2" or dist.get_world_size() == 1
    contents = ["model", "optimizer", "extra", *(["hf_model"] if exportable else [])]
    batches = SEQUENCES * dist.get_world_size()
    settings = [
        f"actor_rollout_ref.model.path={arguments.model}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.use_torch_compile=false",
        f"actor_rollout_ref.ref.strategy={arguments.strategy}",
        f"critic.model.tokenizer_path={arguments.model}",
        *(
            setting
            for role in ("actor_rollout_ref.actor", "critic")
            for setting in (
                f"{role}.strategy={arguments.strategy}",
                f"{role}.ppo_mini_batch_size={batches}",
                f"{role}.ppo_micro_batch_size_per_gpu=2",
                f"{role}.optim.lr=1e-3",
                f"++{role}.optim.lr_warmup_steps=4",
                f"{role}.optim.weight_decay=0.0",
                f"{role}.optim.total_training_steps=100",
                f"{role}.checkpoint.save_contents={contents}".replace("'", ""),
            )
        ),
        *(
            setting
            for model, path in (("actor_rollout_ref.model", arguments.model), ("critic.model", arguments.value_model))
            for setting in (
                f"{model}.path={path}",
                f"{model}.use_remove_padding=false",
                f"{model}.enable_gradient_checkpointing=false",
                f"+{model}.override_config.attn_implementation=sdpa",
            )
        ),
    ]
    if hasattr(fsdp_workers, "RewardModelWorker"):
        settings += [
            f"reward_model.strategy={arguments.strategy}",
            f"reward_model.model.path={arguments.value_model}",
            "reward_model.model.input_tokenizer=null",
            "reward_model.micro_batch_size_per_gpu=2",
        ]
    return compose_resolved([*settings, *(fp16_settings(arguments) if arguments.fp16 else ()), *more])


def fp16_settings(arguments: argparse.Namespace) -> list[str]:
    """What stock verl has for FP16: a key that FSDP reads, and where the release has it the one that it documents."""
    sections = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.model.fsdp_config")
    if arguments.fp16 == "mixed_precision":
        return [f"+{section}.mixed_precision.param_dtype=fp16" for section in sections]
    stock = compose_resolved([])
    return [f"{section}.dtype=float16" for section in sections if OmegaConf.select(stock, f"{section}.dtype")]


def compose_resolved(settings: list[str]) -> DictConfig:
    config = compose("ppo_trainer", overrides=settings)
    OmegaConf.resolve(config)
    return config


def as_critic_config(section: DictConfig) -> Any:
    """What the trainer hands a critic worker: a dataclass, but in 0.5.0."""
    if find_spec("verl.workers.config") is None:
        return section
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(section)


def batch(sequences: int = SEQUENCES) -> DataProto:
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = PROMPT + RESPONSE
    input_ids = torch.randint(2, 90, (sequences, tokens), generator=generator)
    mask = torch.ones(sequences, tokens, dtype=torch.int64)
    noise = torch.randn(sequences, RESPONSE, generator=generator)
    tensors = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).repeat(sequences, 1),
        "prompts": input_ids[:, :PROMPT],
        "responses": input_ids[:, PROMPT:],
        "response_mask": mask[:, PROMPT:],
        "advantages": 1.0 + noise.abs(),
    }
    meta = {"temperature": 1.0, "global_token_num": [tokens] * sequences, "micro_batch_size": 2}
    return DataProto.from_dict(tensors=tensors, meta_info=meta)


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
    """What each role computes in, and the dtype of what it returns."""
    facts: dict[str, Any] = {}
    for role in ("actor", "critic", "ref", *REWARD):
        learner = Learner(arguments, role)
        with watching_compute(learner.module) as seen:
            output = learner.score()
        scaler = scaler_of(learner)
        facts[role] = {
            "dtypes": sorted(seen),
            "output": dtype_name(output.dtype),
            "scaler": scaler is not None and scaler.is_enabled(),
        }
    return facts


def rope(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of models that are stored in half, how far RoPE's frequencies are from an actor's, which is not."""
    whole = frequencies(Learner(arguments))
    facts = {}
    for role in ("ref", *REWARD):
        halved = frequencies(Learner(arguments, role, "++actor_rollout_ref.ref.fsdp_config.model_dtype=bf16"))
        facts[role] = max(float((half - full).abs().max()) for half, full in zip(halved, whole, strict=True))
    return facts


def frequencies(learner: Learner) -> list[torch.Tensor]:
    return [buffer.float() for name, buffer in learner.module.named_buffers() if name.endswith("inv_freq")]


def oracle(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each role two steps from one seed: norm of the second one's gradient, and how far it took the parameters."""
    facts = {}
    for role in ROLES:
        learner = Learner(arguments, role)
        learner.step()  # the learning rate of the first step of a warm-up is 0
        before = learner.parameters()
        metrics = learner.step()
        moved = (learner.parameters() - before).double().square().sum()
        dist.all_reduce(moved)
        facts[role] = {"grad_norm": metrics[f"{role}/grad_norm"][0], "moved": float(moved.sqrt())}
    return facts


def wire(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Weights as the sampler gets them: their dtypes, and whether they are the masters to the last bit."""
    learner = Learner(arguments)
    if not hasattr(learner.worker, "rollout_mode"):
        return None
    learner.step()
    masters = get_model_state_dict(learner.module, options=StateDictOptions(full_state_dict=True))
    sent = weights_sent_by(learner.worker)
    return {
        "dtypes": sorted({dtype_name(weight.dtype) for weight in sent.values()}),
        "exact": all(torch.equal(weight.float(), masters[name]) for name, weight in sent.items()),
    }


def weights_sent_by(worker: Any) -> dict[str, torch.Tensor]:
    """What `rollout_mode` gives to a sampler; the sampler here keeps it."""
    sent: dict[str, torch.Tensor] = {}

    class Sampler:
        async def resume(self, tags: list[str]) -> None:
            pass

        async def update_weights(self, weights: Any, **_kwargs: Any) -> None:
            sent.update((name, weight.clone()) for name, weight in weights)

    if isinstance(worker.actor_module_fsdp, FullyShardedDataParallel):
        # As `_build_rollout` does for several ranks.
        kind, config = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()
        FullyShardedDataParallel.set_state_dict_type(worker.actor_module_fsdp, kind, config)
    worker.rollout, worker.base_sync_done, worker.layered_summon = Sampler(), True, False
    worker.gen_random_states = torch.get_rng_state()
    asyncio.run(worker.rollout_mode())
    return sent


def small_gradients(arguments: argparse.Namespace) -> dict[str, Any]:
    """The share of the gradient that is left of losses so small that FP16 gradients vanish without a scale."""
    facts = {}
    for role in ROLES:
        learner = Learner(arguments, role)
        norms = [learner.update(factor)[f"{role}/grad_norm"][0] for factor in (1.0, VANISHING)]
        facts[role] = norms[1] / norms[0] / VANISHING
    return facts


def overflow_on_one_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each role a clean step, then one whose gradients overflow on the last rank only, then a clean one."""
    return {role: overflow_of(Learner(arguments, role)) for role in ROLES}


def overflow_of(learner: Learner) -> dict[str, Any]:
    clean = learner.step()
    before, lr_before = learner.parameters(), learner.lr()
    overflow = learner.step(poisoned={dist.get_world_size() - 1})
    after, lr_after = learner.parameters(), learner.lr()
    last = learner.step()
    return {
        "clean_metrics": fp16_metrics(clean),
        "overflow_metrics": fp16_metrics(overflow),
        "last_metrics": fp16_metrics(last),
        "unchanged_on_every_rank": on_every_rank(torch.equal(before, after)),
        "moved_by_a_clean_step": on_every_rank(not torch.equal(after, learner.parameters())),
        "nan_parameters": sum_over_ranks(int(after.isnan().sum())),
        "lr": [lr_before, lr_after, learner.lr()],
        "scaler": scaler_facts(learner),
    }


def averaged_norm(arguments: argparse.Namespace) -> dict[str, Any]:
    """The grad_norm a user sees for an update in which one of two mini-batches was skipped."""
    from verl.utils.metric import reduce_metrics

    facts = {}
    for role in ROLES:
        metrics = reduce_metrics(dict(Learner(arguments, role).update(OVERFLOWING, 1.0)))
        facts[role] = {name: float(value) for name, value in metrics.items()}
    return facts


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each role skip, step, save; then what a fresh worker goes on with after loading."""
    return {role: resume_of(arguments, role) for role in ROLES}


def resume_of(arguments: argparse.Namespace, role: str) -> dict[str, Any]:
    learner = Learner(arguments, role)
    for poisoned in (set(range(dist.get_world_size())), set(), set()):
        learner.step(poisoned)
    saved = scaler_facts(learner)
    path = checkpoint_of(arguments, role)
    learner.worker.save_checkpoint(path, global_step=3)
    fresh = Learner(arguments, role)
    fresh.step()
    fresh.worker.load_checkpoint(path, del_local_after_load=False)
    resumed = scaler_facts(fresh)
    fresh.step()
    return {"saved": saved, "resumed": resumed, "next": scaler_facts(fresh), "path": path}


def resume_from_stock(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loading a checkpoint that holds no scaler state."""
    path = Path(checkpoint_of(arguments, "actor"))
    dist.barrier()
    if dist.get_rank() == 0:
        for state in path.glob("fp16_patch_*"):
            state.unlink()
    dist.barrier()
    fresh = Learner(arguments)
    fresh.step()
    fresh.worker.load_checkpoint(str(path), del_local_after_load=False)
    return scaler_facts(fresh)


def checkpoint_of(arguments: argparse.Namespace, role: str) -> str:
    return str(Path(arguments.out) / "checkpoint" / role)


def exports(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `hf_model` folder of a checkpoint: what its label says and what it holds."""
    folder = Path(checkpoint_of(arguments, "actor")) / "huggingface"
    return folder_facts(folder) if list(folder.glob("*.safetensors")) else {}


def endless_overflow(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each role non-finite gradients in every step, on one rank: how far the scale falls and what the run says."""
    return {role: endless_overflow_of(Learner(arguments, role)) for role in ROLES}


def endless_overflow_of(learner: Learner) -> dict[str, Any]:
    learner.step()
    for attempt in range(1, 201):
        for parameter in learner.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if dist.get_rank() == dist.get_world_size() - 1:
            local(next(p for p in learner.module.parameters() if local(p).numel()).grad).view(-1)[0] = math.nan
        try:
            learner.learner._optimizer_step()
        except Exception as stopped:  # the facts are what is asserted on
            error = {"error": type(stopped).__name__, "message": str(stopped)}
            return {"attempt": attempt, **error, **scaler_facts(learner)}
    return {"attempt": 200, "error": None, "message": "", **scaler_facts(learner)}


def temperature(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-probs at a temperature below 1, against exact arithmetic on the very logits the model returned."""
    learner = Learner(arguments)
    logits: list[torch.Tensor] = []
    # verl divides in place.
    handle = learner.module.register_forward_hook(lambda _m, _i, output: logits.append(output.logits.detach().clone()))
    scored = learner.score(temperature=0.7)
    handle.remove()
    exact = (torch.cat(logits).double()[:, PROMPT - 1 : -1] / 0.7).log_softmax(-1)
    targets = batch().batch["responses"].unsqueeze(-1)
    error = (scored.double() - exact.gather(-1, targets).squeeze(-1)).abs().max()
    return {"logits": dtype_name(logits[0].dtype), "largest_error": float(error)}


def scaler_of(learner: Learner) -> Any:
    return getattr(learner.learner, "scaler", None)


def scaler_facts(learner: Learner) -> dict[str, Any]:
    scaler = scaler_of(learner)
    if scaler is None or not scaler.is_enabled():
        return {"scale": None, "growth": None}
    return {"scale": scaler.get_scale(), "growth": scaler._get_growth_tracker()}


def fp16_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name.partition("/")[2]: list(map(float, value)) for name, value in metrics.items() if "/fp16/" in name}


def on_every_rank(holds: bool) -> bool:
    return sum_over_ranks(int(holds)) == dist.get_world_size()


def sum_over_ranks(number: int) -> int:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


SCENARIOS: dict[str, Callable[[argparse.Namespace], dict[str, Any] | None]] = {
    scenario.__name__: scenario
    for scenario in (
        compute_dtypes,
        rope,
        oracle,
        wire,
        small_gradients,
        overflow_on_one_rank,
        averaged_norm,
        resume,
        exports,
        resume_from_stock,
        endless_overflow,
        temperature,
    )
}


def main() -> None:
    dist.init_process_group("gloo")
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=("fsdp", "fsdp2"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--value-model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--import", dest="module", help="imported before a worker is made")
    parser.add_argument("--fp16", choices=("mixed_precision", "documented"))
    # Stock verl builds its scaler for CUDA. Some of its defects show only where that scaler works, as it does on a GPU.
    parser.add_argument("--working-scaler", action="store_true")
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    arguments = parser.parse_args()
    if arguments.module:
        import_module(arguments.module)
    if arguments.working_scaler:
        defaults = ShardedGradScaler.__init__.__defaults__
        ShardedGradScaler.__init__.__defaults__ = ("cpu", *defaults[1:])
    # A rank that fails ends the others through torchrun: nothing here waits for a collective it will not join.
    with initialize_config_module("verl.trainer.config", version_base=None):
        facts = {name: SCENARIOS[name](arguments) for name in arguments.scenarios}
    if dist.get_rank() == 0:
        Path(arguments.out, "facts.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
