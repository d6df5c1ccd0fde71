"""PPO's optimizer step, computed again from its micro-batches when their gradients overflow.

OpenRLHF computes a micro-batch in each call of `training_step`, and DeepSpeed steps in the last of an update. The calls
since the last step are kept, by reference, and made again. SFT, reward models and DPO compute theirs in the middle of a
loop over an epoch, where nobody can make one again: they skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fp16_patch.openrlhf.deepspeed.engines import inner
from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.retry import retries_wanted

_LOSSES = ("policy_loss", "critic_loss")


def actor_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`ActorPPOTrainer.training_step`: compute the update again while its gradients overflow."""
    with _averaged_once(trainer) as first:
        return _step(inner(trainer.actor), lambda: wrapped(*args, **kwargs), first)


def critic_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`CriticPPOTrainer.training_step`: compute the update again while its gradients overflow."""
    return _step(inner(trainer.critic), lambda: wrapped(*args, **kwargs), lambda: None)


@dataclass
class _MicroBatch:
    """A call of `training_step`, with the generators as they were before it: between two, others draw from them."""

    random: RandomState
    compute: Callable[[], Any]
    loss: Any = None

    def run(self) -> Any:
        status = self.compute()
        values = status.get("metrics", status)
        self.loss = next((values[name] for name in _LOSSES if name in values), 0.0)
        return status

    def run_again(self) -> Any:
        self.random.restore()
        return self.run()


def _step(engine: Any, compute: Callable[[], Any], first_is_done: Callable[[], None]) -> Any:
    if not (retries_wanted() and engine.fp16_enabled()):
        return compute()
    step = DeepSpeedStep.of(engine)
    update, attempted = step.micro_batches, step.history.attempted
    update.append(_MicroBatch(RandomState(torch.device(engine.device).type), compute))

    def attempt(again: bool) -> Any:
        if again:
            return [micro_batch.run_again() for micro_batch in update][-1]
        status = update[-1].run()
        first_is_done()
        return status

    status = step.retry_on_overflow(attempt, lambda _: all(math.isfinite(micro_batch.loss) for micro_batch in update))
    if step.history.attempted > attempted:
        update.clear()
    return status


@contextmanager
def _averaged_once(trainer: Any) -> Iterator[Callable[[], None]]:
    """Average the weights at the end of this block, as often as the first attempt in it asked for.

    An average moves by the weights as the update leaves them, and its clock counts micro-batches.
    """
    strategy = trainer.strategy
    if not getattr(trainer, "ema_model", None):
        yield lambda: None
        return
    average, calls, first = strategy.moving_average, [], []
    strategy.moving_average = lambda *args, **kwargs: calls.append((args, kwargs))
    try:
        yield lambda: first.extend(calls)
    finally:
        del strategy.moving_average
    for args, kwargs in first or calls:
        average(*args, **kwargs)
