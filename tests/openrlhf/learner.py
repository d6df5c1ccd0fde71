"""OpenRLHF's own DeepSpeed learner on gloo ranks, put through what FP16 training meets; leaves one JSON of facts.

Started by `tests.ranks`; see `deepspeed/test_learner.py`. Nothing here looks at fp16_patch: the same facts are taken
from stock OpenRLHF and from OpenRLHF under a plan.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.models import Actor, get_llm_for_sequence_regression
from openrlhf.utils import get_strategy

try:
    from openrlhf.utils.config import hierarchize
except ImportError:  # up to 0.10.1, whose command line has no sections
    hierarchize = None

# Large enough to overflow FP16 gradients, small enough for a finite FP32 loss.
OVERFLOWING = 1e30
SEQUENCES, TOKENS, ACCUMULATED = 2, 12, 2


# Up to 0.9.1 OpenRLHF has no float16, only this switch.
ONLY_BF16 = "bf16" in inspect.signature(Actor).parameters


class Learner:
    """A policy or a critic prepared by OpenRLHF's strategy, with a loss that can be made to overflow on some ranks."""

    def __init__(self, arguments: argparse.Namespace, role: str = "actor") -> None:
        self.strategy = strategy_of(arguments)
        model = model_of(self.strategy, arguments, role, self.strategy.get_ds_train_config(None))
        self.model, self.optimizer, self.scheduler = self.strategy.prepare(training(self.strategy, model))
        self.engine = self.model.model if role == "actor" else self.model

    def step(self, poisoned: frozenset[int] | set[int] = frozenset()) -> None:
        """One update of two micro-batches."""
        sequences, mask = batch()
        factor = OVERFLOWING if dist.get_rank() in poisoned else 1.0
        for _ in range(ACCUMULATED):
            output = self.model(sequences, mask[:, 1:], attention_mask=mask)
            self.strategy.backward(-output.float().mean() * factor, self.model, self.optimizer)
            self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler, name="model")

    def scale(self) -> float | None:
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    def masters(self) -> torch.Tensor:
        """This rank's FP32 master weights, one after the other."""
        optimizer = self.engine.optimizer
        groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
        return torch.cat([group.detach().flatten().clone() for group in groups])

    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])


def strategy_of(arguments: argparse.Namespace) -> Any:
    strategy = get_strategy(run_arguments(arguments))
    if arguments.by_hand:
        enable_float16(strategy)
    strategy.setup_distributed()
    return strategy


def enable_float16(strategy: Any) -> None:
    """What a person can write into DeepSpeed's configuration where OpenRLHF has no switch for it."""
    configured = strategy.get_ds_train_config
    strategy.get_ds_train_config = lambda *args, **kwargs: {**configured(*args, **kwargs), "fp16": {"enabled": True}}


def model_of(strategy: Any, arguments: argparse.Namespace, role: str, config: dict[str, Any]) -> Any:
    dtype = {"bf16": strategy.args.bf16} if ONLY_BF16 else {"param_dtype": strategy.param_dtype}
    settings = {"attn_implementation": "sdpa", **dtype, "ds_config": config}
    if "attn_implementation" not in inspect.signature(Actor).parameters:
        del settings["attn_implementation"]  # the first releases leave the choice to transformers
    if role == "actor":
        return Actor(arguments.model, **settings)
    return get_llm_for_sequence_regression(arguments.model, role, init_value_head=True, **settings)


def run_arguments(arguments: argparse.Namespace) -> Any:
    """What OpenRLHF's command line would have parsed."""
    dtype = arguments.param_dtype
    size = {"micro_train_batch_size": SEQUENCES, "train_batch_size": SEQUENCES * ACCUMULATED * dist_size()}
    if hierarchize is None:
        own = {"bf16": dtype == "bf16"} if ONLY_BF16 else {"param_dtype": dtype}
        where = {"pretrain": arguments.model, "ckpt_path": str(Path(arguments.out) / "checkpoints")}
        parallel = {"zero_stage": arguments.zero_stage, "ds_tensor_parallel_size": 1, "load_in_4bit": False}
        common = {"local_rank": -1, "seed": 1, "use_dynamic_batch": False}
        return argparse.Namespace(**own, **where, **parallel, **common, **size)
    flags = {
        "actor.model_name_or_path": arguments.model,
        "ckpt.path": str(Path(arguments.out) / "checkpoints"),
        "ds.param_dtype": dtype,
        "ds.zero_stage": arguments.zero_stage,
        "ds.tensor_parallel_size": 1,
        "ds.load_in_4bit": False,
        "local_rank": -1,
        "train.seed": 1,
        "train.micro_batch_size": size["micro_train_batch_size"],
        "train.batch_size": size["train_batch_size"],
        "train.dynamic_batch_enable": False,
    }
    return hierarchize(argparse.Namespace(**flags))


def training(strategy: Any, model: Any) -> tuple[Any, ...]:
    """What OpenRLHF prepares for training: up to 0.10.1 with an optimizer and a schedule, then with their settings."""
    adam = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    if hasattr(strategy, "create_optimizer"):
        from transformers.trainer import get_scheduler

        optimizer = strategy.create_optimizer(model, **adam)
        return model, optimizer, get_scheduler("linear", optimizer, num_warmup_steps=10, num_training_steps=100)
    schedule = {"lr_scheduler": "linear", "lr_warmup_ratio": 0.1, "scheduler_steps": 100, "max_norm": 1.0}
    return model, {"optim": "adam", "adam": adam, **schedule}


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    sequences = torch.randint(3, 90, (SEQUENCES, TOKENS), generator=generator)
    return sequences, torch.ones_like(sequences)


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """What DeepSpeed made of OpenRLHF's configuration, and what the model computes in."""
    facts = {}
    for role in ("actor", "critic"):
        learner = Learner(arguments, role)
        dtypes = watched(learner.engine.module)
        accumulated = gradient_dtypes(learner)
        scaler, module = learner.engine.optimizer.loss_scaler, learner.engine.module
        facts[role] = {
            "scale": learner.scale(),
            "window": getattr(scaler, "scale_window", None),
            "hysteresis": getattr(scaler, "delayed_shift", None),
            "floor": getattr(scaler, "min_scale", None),
            "communication": name_of(learner.engine.communication_data_type),
            "accumulation": accumulated,
            "master": name_of(learner.masters().dtype),
            **dtypes_of(module),
            "outputs": sorted(dtypes),
        }
    return facts


def frozen(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reference and a reward model compute in."""
    facts = {}
    strategy = strategy_of(arguments)
    for role in ("actor", "reward"):
        model = strategy.prepare(model_of(strategy, arguments, role, strategy.get_ds_eval_config()))
        module = (model.model if role == "actor" else model).module
        outputs = watched(module)
        sequences, mask = batch()
        with torch.no_grad():
            model(sequences, mask[:, 1:], attention_mask=mask) if role == "actor" else model(sequences, mask)
        facts[role] = {**dtypes_of(module), "outputs": sorted(outputs)}
    return facts


def dtypes_of(module: torch.nn.Module) -> dict[str, list[str]]:
    return {
        "parameters": sorted({name_of(parameter.dtype) for parameter in module.parameters()}),
        "rope": sorted({name_of(buffer.dtype) for name, buffer in module.named_buffers() if "inv_freq" in name}),
    }


def overflow_on_one_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two good updates, one that overflows on the last rank only, one good one."""
    learner = Learner(arguments)
    learner.step()
    learner.step()
    before, lr, scale = learner.masters(), learner.lr(), learner.scale()
    learner.step(poisoned={dist.get_world_size() - 1})
    after = learner.masters()
    held, lowered = learner.lr() == lr, learner.scale()
    learner.step()
    return {
        "unchanged_on_every_rank": everywhere(torch.equal(before, after)),
        "lr_held": held,
        "lr_moves_again": learner.lr() != lr,
        "trains_again": everywhere(not torch.equal(after, learner.masters())),
        "scale_before": scale,
        "scale_after": lowered,
        "skipped_of_attempted": [learner.engine.skipped_steps, learner.engine.global_steps],
    }


def infinite_norm(arguments: argparse.Namespace) -> dict[str, Any]:
    """An update of finite gradients, the norm of which is not, between good ones; and what became of it."""
    learner = Learner(arguments)
    learner.step()
    learner.step()
    before, lr, scale = learner.masters(), learner.lr(), learner.scale()
    take = learner.strategy.optimizer_step

    def huge_gradients(*args: Any, **kwargs: Any) -> None:
        if learner.engine.is_gradient_accumulation_boundary():
            for gradients in learner.engine.optimizer.averaged_gradients.values():
                for gradient in gradients:
                    gradient.fill_(1e30)
        take(*args, **kwargs)

    learner.strategy.optimizer_step = huge_gradients
    learner.step()
    learner.strategy.optimizer_step = take
    after, lowered = learner.masters(), learner.scale()
    held = learner.lr() == lr
    learner.step()
    return {
        "unchanged_on_every_rank": everywhere(torch.equal(before, after)),
        "lr_held": held,
        "halved": scale / lowered,
        "skipped_of_attempted": [learner.engine.skipped_steps, learner.engine.global_steps],
        "trains_again": everywhere(not torch.equal(after, learner.masters())),
    }


def endless_overflow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Updates that overflow until something stops them, 40 at most; how it ended."""
    learner = Learner(arguments)
    for attempt in range(1, 41):
        try:
            learner.step(poisoned={0})
        except Exception as end:
            return {"attempts": attempt, "error": type(end).__name__, "message": str(end)}
    return {"attempts": 40, "error": None, "message": "", "scale": learner.scale()}


def growing_scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """The norm of the gradient that reaches the optimizer in each of six like updates, as the scale grows."""
    learner = Learner(arguments)
    scaler = learner.engine.optimizer.loss_scaler
    # It doubles at every other update, and never so far that one overflows.
    scaler.scale_window, scaler.cur_scale = 1, 256.0
    learner.engine.optimizer.clip_grad = 0.0
    scales, norms = [], []
    with gradients_given_to(learner.engine.optimizer) as given:
        for _ in range(6):
            # From the same weights: what is compared is one gradient, unscaled at different scales.
            learner.engine.optimizer.optimizer.param_groups[0]["lr"] = 0.0
            scales.append(learner.scale())
            learner.step()
            norms.append(float(torch.linalg.vector_norm(torch.cat(given))))
            given.clear()
    return {"scales": [*scales, learner.scale()], "norms": norms}


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """A run saved after an overflow, and one that goes on from it."""
    folder = str(Path(arguments.out) / "resumed")
    learner = Learner(arguments)
    learner.step(poisoned={0})
    learner.step()
    saved = {"scale": learner.scale(), "iteration": learner.engine.optimizer.loss_scaler.cur_iter}
    learner.engine.optimizer.loss_scaler.scale_window = 50
    learner.strategy.save_ckpt(learner.engine, folder, "step", client_state={"global_step": 7})
    resumed = Learner(arguments)
    fresh = resumed.scale()
    _, states = resumed.strategy.load_ckpt(resumed.engine, folder)
    scaler = resumed.engine.optimizer.loss_scaler
    facts = {
        "saved": saved,
        "fresh": fresh,
        "resumed": {"scale": resumed.scale(), "iteration": scaler.cur_iter},
        "window": scaler.scale_window,
        "client_state": states["global_step"],
        "counted": {name: states.get("fp16_patch", {}).get("history", {}).get(name) for name in COUNTERS},
        "trains": trains(resumed),
    }
    if dist.get_rank() == 0:
        learner.engine.optimizer.loss_scaler.cur_scale = math.nan
    learner.strategy.save_ckpt(learner.engine, folder, "damaged")
    resumed.strategy.load_ckpt(resumed.engine, folder)
    # With one rank there is no other's scale to go on at.
    good = saved["scale"] if dist.get_world_size() > 1 else scaler.cur_scale
    return {**facts, "undamaged_everywhere": everywhere(math.isfinite(good) and resumed.scale() == good)}


# With gradients that overflow a few halvings below it.
TOO_HIGH = 2.0**20
DROPOUT = 0.2
# One update's advantages on the last rank, whose gradients need another few halvings.
HUGE = 2.0**11


class Trainer:
    """OpenRLHF's own PPO trainer of a policy or a critic, with dropout, made without what only Ray needs."""

    def __init__(self, arguments: argparse.Namespace, role: str, start: float) -> None:
        self.learner, self.role = Learner(arguments, role), role
        self.learner.engine.optimizer.loss_scaler.cur_scale = start
        for module in self.learner.engine.module.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = DROPOUT
        self.trainer = self._actor(arguments) if role == "actor" else self._critic()
        self.forwards = 0
        self.learner.engine.module.register_forward_hook(self._count)

    def update(self, factor: float = 1.0) -> list[dict[str, Any]]:
        statuses = []
        for number in range(ACCUMULATED):
            arguments = (experience_of(number, factor), 0.0, number)
            status = self.trainer.training_step(*(arguments if self.role == "actor" else (arguments[0], number)))
            statuses.append({name: float(value) for name, value in plain_status(status).items()})
            # Between micro-batches others draw random numbers, too.
            torch.rand(3)
        return statuses

    def averages(self) -> torch.Tensor | None:
        weights = getattr(self.trainer, "ema_model", None)
        return None if weights is None else torch.cat([value.detach().flatten() for value in weights.parameters()])

    def state(self) -> torch.Tensor:
        """This rank's masters and their moments."""
        optimizer = self.learner.engine.optimizer.optimizer
        moments = [
            value.flatten() for state in optimizer.state.values() for value in map(torch.as_tensor, state.values())
        ]
        return torch.cat([self.learner.masters(), *(moment.float().cpu() for moment in moments)])

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def _actor(self, arguments: argparse.Namespace) -> Any:
        from openrlhf.models import PolicyLoss
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

        trainer = self._bare(ActorPPOTrainer, "actor")
        trainer.ema_model, trainer.ema_beta = None, 0.5
        if arguments.zero_stage < 3:
            trainer.ema_model = copy.deepcopy(self.learner.engine.module).float()
        # The device it names is the one that the average is computed on.
        strategy, average = self.learner.strategy, type(self.learner.strategy).moving_average
        type(strategy).moving_average = lambda own, model, ema, beta, _device: average(own, model, ema, beta, "cpu")
        trainer.actor_loss_fn = PolicyLoss()
        return trainer

    def _critic(self) -> Any:
        from openrlhf.models import ValueLoss
        from openrlhf.trainer.ray.ppo_critic import CriticPPOTrainer

        trainer = self._bare(CriticPPOTrainer, "critic")
        trainer.critic_loss_fn = ValueLoss(None)
        return trainer

    def _bare(self, kind: type, role: str) -> Any:
        trainer: Any = object.__new__(kind)
        trainer.strategy, trainer.args = self.learner.strategy, self.learner.strategy.args
        trainer.args.actor.entropy_coef, trainer.args.actor.aux_loss_coef = None, 0.0
        trainer.args.algo = argparse.Namespace(kl=argparse.Namespace(use_loss=False))
        trainer.replay_buffer, trainer.aux_loss = None, False
        setattr(trainer, role, self.learner.model)
        setattr(trainer, f"{role}_optim", self.learner.optimizer)
        setattr(trainer, f"{role}_scheduler", self.learner.scheduler)
        return trainer


def experience_of(number: int, factor: float) -> Any:
    from openrlhf.trainer.ppo_utils.experience import Experience

    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    sequences = torch.randint(3, 90, (SEQUENCES, TOKENS), generator=generator)
    actions = torch.ones(SEQUENCES, TOKENS - 1, dtype=torch.bool)
    values = {name: torch.randn(actions.shape, generator=generator) for name in ("advantages", "returns", "values")}
    if dist.get_rank() == dist.get_world_size() - 1:
        values["advantages"] *= factor
        values["returns"] *= factor
    log_probs = torch.full(actions.shape, -4.5)
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=actions,
        action_log_probs=log_probs,
        rollout_log_probs=log_probs,
        **values,
    )


def plain_status(status: dict[str, Any]) -> dict[str, Any]:
    wanted = ("policy_loss", "actor_lr", "actor_grad_norm", "critic_loss", "critic_lr", "critic_grad_norm")
    return {name: value for name, value in status.get("metrics", status).items() if name in wanted}


def retried(arguments: argparse.Namespace) -> dict[str, Any]:
    """PPO from far too high a scale and from the one that was found; empty where its trainer takes other arguments."""
    if hierarchize is None:
        return {}
    return {role: retried_role(arguments, role) for role in ("actor", "critic")}


def retried_role(arguments: argparse.Namespace, role: str) -> dict[str, Any]:
    found = ppo_run(arguments, role, TOO_HIGH)
    clean = ppo_run(arguments, role, found["scales"][0])
    other = ppo_run(arguments, role, found["scales"][0], seed=12)
    same = {name: everywhere(found[name] == clean[name]) for name in found if name != "forwards"}
    return {"same": same, "dropout_matters": other["state"] != clean["state"], "found": found, "clean": clean}


def lost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Six updates, every other one with huge advantages on the last rank: how many the optimizer took."""
    if hierarchize is None:
        return {}
    trainer = Trainer(arguments, "actor", 65536.0)
    for number in range(6):
        trainer.learner.engine.optimizer.loss_scaler.cur_scale = 4096.0
        trainer.update(HUGE if number % 2 else 1.0)
    engine = trainer.learner.engine
    return {"taken": engine.global_steps - engine.skipped_steps, "attempted": engine.global_steps}


def ppo_run(arguments: argparse.Namespace, role: str, start: float, seed: int = 11) -> dict[str, Any]:
    """What three updates leave behind."""
    trainer = Trainer(arguments, role, start)
    torch.manual_seed(seed + dist.get_rank())
    statuses, scales = [], []
    for _ in range(3):
        statuses.append(trainer.update())
        scales.append(trainer.learner.scale())
    averages, engine = trainer.averages(), trainer.learner.engine
    return {
        "state": digest(trainer.state()),
        "averages": None if averages is None else digest(averages),
        "random": digest(torch.get_rng_state()),
        "statuses": statuses,
        "scales": scales,
        "steps": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "average_clock": trainer.learner.strategy.time_steps["ema"],
        "forwards": trainer.forwards,
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


COUNTERS = ("attempted", "skipped_total", "consecutive_skips")


def trains(learner: Learner) -> bool:
    before = learner.masters()
    learner.step()
    return everywhere(not torch.equal(before, learner.masters()))


def everywhere(fact: bool) -> bool:
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return all(facts)


def gradient_dtypes(learner: Learner) -> list[str]:
    """Dtypes of the gradients that an update's micro-batches have added up to, seen as the step begins."""
    seen: set[str] = set()
    optimizer, step = learner.engine.optimizer, learner.engine.optimizer.step

    def looking(*args: Any, **kwargs: Any) -> Any:
        for gradients in optimizer.averaged_gradients.values():
            seen.update(name_of(gradient.dtype) for gradient in gradients)
        return step(*args, **kwargs)

    optimizer.step = looking
    learner.step()
    optimizer.step = step
    return sorted(seen)


def watched(module: torch.nn.Module) -> set[str]:
    """Fills with the dtypes of what linear layers put out."""
    dtypes: set[str] = set()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _layer, _inputs, output: dtypes.add(name_of(output.dtype)))
    return dtypes


@contextmanager
def gradients_given_to(optimizer: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the gradients DeepSpeed hands to the optimizer it wraps, unscaled and clipped."""
    given: list[torch.Tensor] = []
    step = optimizer.optimizer.step

    def collecting(*args: Any, **kwargs: Any) -> Any:
        weights = [weight for group in optimizer.optimizer.param_groups for weight in group["params"]]
        given.extend(weight.grad.detach().flatten().clone() for weight in weights if weight.grad is not None)
        return step(*args, **kwargs)

    optimizer.optimizer.step = collecting
    try:
        yield given
    finally:
        optimizer.optimizer.step = step


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SCENARIOS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        configuration,
        frozen,
        overflow_on_one_rank,
        infinite_norm,
        endless_overflow,
        growing_scale,
        resume,
        retried,
        lost,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    for name in ("--model", "--out"):
        parser.add_argument(name)
    parser.add_argument("--param-dtype", default="bf16")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--by-hand", action="store_true")
    arguments = parser.parse_args()
    facts = {name: SCENARIOS[name](arguments) for name in arguments.scenarios}
    if dist.get_rank() == 0:
        (Path(arguments.out) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
