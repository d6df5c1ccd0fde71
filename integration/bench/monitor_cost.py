"""Measure what observing costs: per token, beside the learner's forward, and in the actors that merge."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.aggregator import MAX_PENDING_CALLS, aggregator_here
from fp16_patch.mismatch.collection.monitor import Monitor
from fp16_patch.mismatch.collection.part import Part
from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.statistics.summary import MismatchStats
from integration.demo import make_model
from integration.demo.side_by_side import prepare_model

MICRO_BATCH = 16
BF16_NOISE = 5e-3


@dataclass(frozen=True)
class Size:
    """What is observed and merged.

    Attributes:
        repeats: of what is timed.
        batch: sequences and tokens of what is timed a token.
        width, depth: of the large model.
        large_batch, demo_batch: sequences, tokens of a prompt, tokens of a response. The demo's are those of its
            trainer: all that a step samples.
        nodes, ranks, merges: of the job whose reports are merged.
        steps: after which, and up to which, the root's memory may grow.
        model: what is put into the demo's model.
    """

    repeats: int = 9
    batch: tuple[int, int] = (256, 1024)
    # 111 M parameters.
    width: int = 768
    depth: int = 12
    large_batch: tuple[int, int, int] = (4, 64, 256)
    demo_batch: tuple[int, int, int] = (32, 16, 32)
    nodes: int = 4
    ranks: int = 4096
    merges: int = 3
    steps: tuple[int, int] = (200, 1200)
    model: make_model.Effort = make_model.FULL


FULL = Size()
SMOKE = Size(
    repeats=1,
    batch=(4, 16),
    width=96,
    depth=1,
    large_batch=(1, 4, 4),
    demo_batch=(1, 4, 4),
    nodes=2,
    ranks=4,
    merges=1,
    steps=(1, 2),
    model=make_model.SMOKE,
)


def ns_per_token(_out: Path, seed: int, size: Size) -> float:
    """Time nanoseconds a token on one core, token ids included; the median of the repeats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batch = simulated_log_probs(size.batch, seed)
        observe(*batch)
        seconds = statistics.median(timed(lambda: observe(*batch)) for _ in range(4 * size.repeats))
    finally:
        torch.set_num_threads(threads)
    return seconds / int(batch[2].sum()) * 1e9


def observe_vs_forward(out: Path, seed: int, size: Size) -> dict[str, float]:
    """Time observing a batch ÷ the learner's log-prob forward on it, on the same cores, alternating; medians.

    The demo's learner computes in BF16 autocast, which a CPU without BF16 units is slow at; `_fp32` is the same against
    a forward in FP32, the faster one there.
    """
    torch.manual_seed(seed)
    large = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32000,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=12,
            num_key_value_heads=12,
            tie_word_embeddings=True,
        )
    )
    assert size is not FULL or sum(parameter.numel() for parameter in large.parameters()) >= 100e6
    demo = AutoModelForCausalLM.from_pretrained(prepare_model(out, Console(), size.model))
    return {
        f"{name}{suffix}": _observing_share(model, batch, bf16, seed, size.repeats)
        for name, model, batch in (("100m", large, size.large_batch), ("demo", demo, size.demo_batch))
        for suffix, bf16 in (("", True), ("_fp32", False))
    }


def _observing_share(model: Any, batch: tuple[int, int, int], bf16: bool, seed: int, repeats: int) -> float:
    rows, prompt, response = batch
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (rows, prompt + response), generator=generator)
    learner = log_prob_forward(model, tokens, response, bf16)
    sampler = learner + BF16_NOISE * torch.randn(learner.shape, generator=generator)
    mask = torch.ones_like(learner)
    forward, observing = [], []
    for _ in range(repeats):
        forward.append(timed(lambda: log_prob_forward(model, tokens, response, bf16)))
        observing.append(timed(lambda: observe(sampler, learner, mask, tokens[:, prompt:])))
    return statistics.median(observing) / statistics.median(forward)


@torch.no_grad()
def log_prob_forward(model: Any, tokens: torch.Tensor, response: int, bf16: bool) -> torch.Tensor:
    """Compute the log-probs of the responses' tokens, as a learner does once a step: in micro-batches."""
    return torch.cat([_score(model.eval(), micro_batch, response, bf16) for micro_batch in tokens.split(MICRO_BATCH)])


def _score(model: Any, tokens: torch.Tensor, response: int, bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(tokens).logits[:, -response - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, -response:, None]).squeeze(-1)


def observe(sampler: torch.Tensor, learner: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> MismatchStats:
    """Observe a batch, as a rank does."""
    return MismatchStats.from_log_probs(sampler, learner, mask, token_ids=tokens).to_host()


def simulated_log_probs(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, ...]:
    """Draw log-probs of sampler and learner that differ as in BF16, a mask of responses of all lengths, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    sampler = -torch.rand(shape, generator=generator).pow(2) * 6
    learner = sampler + BF16_NOISE * torch.randn(shape, generator=generator)
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    tokens = torch.randint(0, 32000, shape, generator=generator)
    return sampler, learner, torch.arange(shape[1]) < lengths, tokens


def timed(action: Callable[[], Any]) -> float:
    """Time an action, in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def merge_seconds(out: Path, seed: int, size: Size) -> float:
    """Time from the last of 4096 ranks' reports to the merged record on disk; the median of the repeats.

    Four Ray nodes on this machine, on each an actor that reports as 1024 ranks to the node's aggregator.
    """
    with simulated_job(size.nodes, out) as (monitor, reporters):
        per_node, seconds = size.ranks // size.nodes, []
        for repeat in range(size.merges):
            ranks = [range(node * per_node, (node + 1) * per_node) for node in range(size.nodes)]
            reported = [
                reporter.report.remote(repeat, list(mine), size.ranks, seed)
                for reporter, mine in zip(reporters, ranks, strict=True)
            ]
            tokens = sum(ray.get(reported))
            monitor.expect(tokens, size.ranks)
            seconds.append(timed(lambda step=repeat: _end(monitor, step)))
        _require_complete(out, size.ranks)
    return statistics.median(seconds)


def root_growth(out: Path, seed: int, size: Size) -> float:
    """Measure the MB by which the root's memory grows from step 200 to step 1200; two ranks report each step."""
    first, last = size.steps
    with simulated_job(1, out) as (monitor, (reporter,)):
        sizes = []
        for steps in (range(first), range(first, last)):
            for step in steps:
                monitor.expect(ray.get(reporter.report.remote(step, [0, 1], 2, seed)), 2)
                monitor.end_step(step, {})
            monitor.flush()
            sizes.append(_resident_mb(ray.get_actor(actors.root_name(monitor.run), actors.NAMESPACE)))
        _require_complete(out, 2)
    return sizes[1] - sizes[0]


@contextmanager
def simulated_job(nodes: int, out: Path) -> Iterator[tuple[Monitor, list[Any]]]:
    """Yield a monitor, and on each of some Ray nodes an actor that reports for many ranks."""
    shutil.rmtree(out, ignore_errors=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
        reporters = [ray.remote(_Reporter).options(scheduling_strategy=place).remote() for place in places]
        monitor = Monitor(out, timeout_s=30.0)
        # The actors start before what is measured.
        ray.get(ray.get_actor(actors.root_name(monitor.run), actors.NAMESPACE).begin.remote(str(out)))
        ray.get([reporter.start.remote(monitor.run) for reporter in reporters])
        yield monitor, reporters
    finally:
        ray.shutdown()
        cluster.shutdown()


class _Reporter:
    """Reports as many ranks, a message each, as their observers do; returns the tokens when all have arrived."""

    def start(self, run: str) -> None:
        # As an observer does: an actor ends with its creator's last handle.
        self._aggregator = aggregator_here(run)
        ray.get(self._aggregator.take.remote({}))

    def report(self, number: int, ranks: list[int], world_size: int, seed: int) -> int:
        stats = MismatchStats.from_log_probs(*simulated_log_probs((4, 64), seed)[:3]).to_host()
        calls = []
        for rank in ranks:
            part = Part(stats, None, frozenset([rank]), world_size)
            calls.append(self._aggregator.report.remote(f"rank {rank}", number, number, part.pack()))
            if len(calls) == MAX_PENDING_CALLS:
                ray.get(calls)
                calls = []
        ray.get(calls)
        return stats.tokens * len(ranks)


def _end(monitor: Monitor, step: int) -> None:
    monitor.end_step(step, {})
    monitor.flush()


def _require_complete(out: Path, ranks: int) -> None:
    for step, coverage in load_run(out).coverage.items():
        if not coverage.complete or coverage.ranks != ranks:
            raise RuntimeError(f"step {step} covers {coverage.text()}")


def _resident_mb(root: Any) -> float:
    pid = ray.get(root.__ray_call__.remote(lambda _self: os.getpid()))
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
