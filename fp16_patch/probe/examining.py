"""The probe itself: samples, scores, measures ranges, judges."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fp16_patch import __version__
from fp16_patch.plan import probe_settings
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.probe import headroom, vllm_sampler
from fp16_patch.probe.comparing import Pair, ratio
from fp16_patch.probe.extremes import Range
from fp16_patch.probe.families import known_risk
from fp16_patch.probe.judging import Evidence, recommend
from fp16_patch.probe.learning import policy_gradient, score
from fp16_patch.probe.loading import (
    batch_tokens,
    by_its_parts,
    load_config_and_tokenizer,
    load_model,
    refusing_to_overflow,
    stop_ids,
    vocabulary_of,
)
from fp16_patch.probe.memory import give_memory_back, giving_memory_back, peak_memory
from fp16_patch.probe.precision import DTYPES, in_dtype
from fp16_patch.probe.progress import Phases, silent
from fp16_patch.probe.prompts import read_prompts
from fp16_patch.probe.request import ProbeRequest
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.sampling import HF, VLLM, Sampling, decode
from fp16_patch.probe.sequences import Sampled
from fp16_patch.probe.watching import BACKWARD, FORWARD, GENERATION, RangeWatch, Site
from fp16_patch.runtime.gemm_sums import sums_in_fp32

FLOOR_BATCH_TOKENS = 1
"""Of the learner's comparison with itself: one sequence a batch."""

FLOOR_SEQUENCES = 4

RANGE_SEQUENCES = 16
"""Sequences of which gradients are measured; activations are measured of all, while they are sampled."""

MIXED_SEQUENCES = 8
"""Sequences on which pairs of two dtypes are scored: they show what mixing costs, and nobody trains so."""


def examine(request: ProbeRequest, phases: Phases = silent) -> ProbeResult:
    """Measure the mismatch of every pair of dtypes and the range of activations and gradients, and judge both.

    Responses are sampled once in each of the sampler's dtypes and scored in each of the learner's. Ranges are those of
    an FP32 run, so that an overflow is seen and not suffered. Products are added up in FP32, as in a run under a plan.

    Raises:
        PlanError: the model cannot be loaded, there is nothing to ask it, or the device's memory is full.
    """
    with sums_in_fp32(), refusing_to_overflow(request.device):
        return _examine(request, phases)


def _examine(request: ProbeRequest, phases: Phases) -> ProbeResult:
    started = time.monotonic()
    config, tokenizer = load_config_and_tokenizer(request.model)
    vocabulary = vocabulary_of(request.model, config)
    prompts = read_prompts(request.prompts, request.count, tokenizer)
    _require_known(max(map(max, prompts)), vocabulary, request.model)
    sampling = Sampling(request.temperature, request.max_new_tokens, stop_ids(request.model, tokenizer), request.seed)
    probe = _Probe(request, prompts, sampling, phases, batch_tokens=batch_tokens(vocabulary))
    # vLLM first: it gives its memory back before the model is loaded here.
    if request.uses_vllm:
        probe.sample_by_vllm()
    model = load_model(request.model, request.device)
    if not request.uses_vllm:
        probe.sample_by_decoding(model)
    probe.look_at_ranges(model)
    probe.compare(model)
    return probe.result(model, config, started)


def _require_known(token: int, vocabulary: int, model: Path) -> None:
    if token >= vocabulary:
        reason = f"its tokenizer gives token {token}, its configuration knows {vocabulary}"
        raise PlanError([Conflict("MODEL", model, reason, "give a tokenizer and a config.json of one model")])


class _Probe:
    """A probe under way, and what it has found so far."""

    def __init__(
        self,
        request: ProbeRequest,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        phases: Phases,
        batch_tokens: int,
    ) -> None:
        self.request, self.prompts, self.sampling, self.phases = request, prompts, sampling, phases
        self.batch_tokens = batch_tokens
        self.sampled: dict[str, list[Sampled]] = {}
        self.refusals: dict[str, str] = {}
        self.ranges: dict[Site, Range] = {}
        self.pairs: dict[str, Pair] = {}
        self.floors: dict[str, Pair] = {}

    @property
    def widest(self) -> str:
        """The widest dtype that was sampled: its responses are those whose ranges are measured."""
        return next(dtype for dtype in ("fp32", "bf16", "fp16") if dtype in self.sampled)

    def sample_by_vllm(self) -> None:
        """Sample in each dtype that vLLM serves, and keep why it refuses the others.

        Raises:
            PlanError: it serves none.
        """
        watched = next(dtype for dtype in ("fp32", "bf16", "fp16") if dtype in self.request.dtypes)
        for dtype in self.request.dtypes:
            with self.phases(f"vLLM samples in {dtype}", None):
                try:
                    self.sampled[dtype], ranges = vllm_sampler.sample(
                        self.request.model, self.prompts, dtype, self.sampling, watch=dtype == watched
                    )
                    self.ranges |= ranges
                except vllm_sampler.SamplerRefused as refused:
                    self.refusals[dtype] = str(refused)
        if not self.sampled:
            fix = "use --sampler hf, or mend what vLLM says"
            raise PlanError([Conflict("--sampler", VLLM, f"it serves no dtype: {self.refusals}", fix)])

    def sample_by_decoding(self, model: nn.Module) -> None:
        """Sample in each dtype by the model's own decoding."""
        for dtype in self.request.dtypes:
            watch = RangeWatch(model)
            watched = watch.during(GENERATION) if dtype == "fp32" else nullcontext()
            cast = in_dtype(model, DTYPES[dtype], held_wide=self.request.device == "cpu")
            with self.phases(f"transformers samples in {dtype}", self.sampling.max_new_tokens) as advance:
                self.sampled[dtype] = decode(
                    cast,
                    self.prompts,
                    DTYPES[dtype],
                    self.sampling,
                    device=self.request.device,
                    advance=giving_memory_back(advance, every=32),
                    watched=watched,
                )
            self.ranges |= watch.ranges()
            del cast
            give_memory_back()

    def look_at_ranges(self, model: nn.Module) -> None:
        """Measure activations and gradients, forward and backward in FP32."""
        watch = RangeWatch(model)
        sequences = self.sampled[self.widest][:RANGE_SEQUENCES]
        model.requires_grad_(True)
        phase = self.phases("activations and gradients in fp32", len(sequences))
        with by_its_parts(model), watch.during(FORWARD), phase as advance:
            policy_gradient(
                model,
                sequences,
                device=self.request.device,
                temperature=self.request.temperature,
                batch_tokens=self.batch_tokens // 4,
                advance=giving_memory_back(advance, every=1),
            )
        model.requires_grad_(False)
        self.ranges |= watch.ranges()

    def compare(self, model: nn.Module) -> None:
        """Score every dtype's responses in every dtype; pairs of one dtype whole, mixed ones in part."""
        for learner in self.request.dtypes:
            cast = in_dtype(model, DTYPES[learner])
            for sampler, sampled in self.sampled.items():
                sequences = sampled if sampler == learner else sampled[:MIXED_SEQUENCES]
                scores = self._scores(cast, sequences, learner, self.batch_tokens, f"{learner} learns from {sampler}")
                self.pairs[f"{learner}/{sampler}"] = Pair.of(sequences, scores)
                if sampler == self.widest:
                    self.floors[learner] = self._floor(cast, sequences, scores, learner)
            del cast
            give_memory_back()

    def _floor(
        self, model: nn.Module, sequences: Sequence[Sampled], scores: Sequence[Sequence[float]], dtype: str
    ) -> Pair:
        some = list(sequences)[:FLOOR_SEQUENCES]
        alone = self._scores(model, some, dtype, FLOOR_BATCH_TOKENS, f"{dtype} against itself")
        by_itself = [
            Sampled(sequence.prompt, sequence.response, tuple(values))
            for sequence, values in zip(some, alone, strict=True)
        ]
        return Pair.of(by_itself, scores[: len(some)])

    def _scores(
        self, model: nn.Module, sequences: Sequence[Sampled], dtype: str, batch_tokens: int, phase: str
    ) -> list[list[float]]:
        with self.phases(phase, len(sequences)) as advance:
            return score(
                model,
                sequences,
                DTYPES[dtype],
                device=self.request.device,
                temperature=self.request.temperature,
                batch_tokens=batch_tokens,
                advance=advance,
            )

    def result(self, model: nn.Module, config: Any, started: float) -> ProbeResult:
        seed = self.request.seed
        figures = {name: pair.figures(seed) for name, pair in self.pairs.items()}
        fit, found = headroom.gradient_fit(self.ranges), headroom.overflows(self.ranges)
        has_both = {"fp16/fp16", "bf16/bf16"} <= self.pairs.keys()
        return ProbeResult(
            model=_described(self.request.model, model, config),
            settings=_settings(self.request, self.prompts),
            mismatch=figures,
            noise_floor={dtype: pair.figures(seed) for dtype, pair in self.floors.items()},
            gain=ratio(self.pairs["bf16/bf16"], self.pairs["fp16/fp16"], seed) if has_both else None,
            headroom=headroom.table(self.ranges, fit.init_scale),
            gradients=asdict(fit) | {"tightest": str(fit.tightest)},
            overflows=[overflow.as_dict() for overflow in found],
            refusals=self.refusals,
            recommendation=recommend(self._evidence(model, config, found, fit, figures)),
            cost={"seconds": time.monotonic() - started, "memory_bytes": float(peak_memory())},
            pairs=self.pairs,
        )

    def _evidence(
        self,
        model: nn.Module,
        config: Any,
        found: Sequence[headroom.Overflow],
        fit: headroom.GradientFit,
        figures: Mapping[str, Mapping[str, Any]],
    ) -> Evidence:
        activations = [seen.headroom() for site, seen in self.ranges.items() if site.phase != BACKWARD]
        return Evidence(
            overflows=found,
            residual=[overflow for overflow in found if headroom.in_residual_stream(overflow.site, model)],
            least_headroom=min(activations),
            fit=fit,
            figures=figures,
            refusals=self.refusals,
            family=known_risk(config.model_type),
        )


def _described(path: Path, model: nn.Module, config: Any) -> dict[str, Any]:
    return {
        "path": str(path.resolve()),
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config_digest": probe_settings.config_digest(path),
    }


def _settings(request: ProbeRequest, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(request).items()}
    releases = {"fp16_patch": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if request.uses_vllm:
        from importlib.metadata import packages_distributions, version

        releases["vllm"] = version(packages_distributions()["vllm"][0])
    return {
        **asked,
        "sampler": VLLM if request.uses_vllm else HF,
        "prompt_tokens": sum(map(len, prompts)),
        "releases": releases,
    }
