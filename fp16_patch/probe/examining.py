"""The probe itself: sample, score, look, judge."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fp16_patch import __version__
from fp16_patch.plan import probe_settings
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.probe import headroom, vllm_sampler
from fp16_patch.probe.comparing import Pair, ratio
from fp16_patch.probe.extremes import Range
from fp16_patch.probe.families import known_risk
from fp16_patch.probe.judging import Evidence, recommend
from fp16_patch.probe.learning import policy_gradient, score
from fp16_patch.probe.precision import DTYPES, in_dtype
from fp16_patch.probe.progress import Advance, Phases, silent
from fp16_patch.probe.prompts import read_prompts
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.sampling import HF, VLLM, Sampling, decode
from fp16_patch.probe.sequences import Sampled
from fp16_patch.probe.watching import BACKWARD, FORWARD, GENERATION, RangeWatch, Site

BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 27
"""A forward's logits, 512 MB of them in FP32, bound its tokens where the vocabulary is large."""

FLOOR_BATCH_TOKENS = 1
"""The learner against itself: a sequence at a time."""

FLOOR_SEQUENCES = 4

RANGE_SEQUENCES = 16
"""Looked at forward and backward; activations of all are looked at while they are sampled."""

MIXED_SEQUENCES = 8
"""Pairs of two dtypes, which show what mixing costs and are not for training, are scored on the first so many."""


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe.

    Attributes:
        model: a directory with a causal language model in Hugging Face's layout.
        prompts: a file, see `read_prompts`; a few built-in ones if None.
        count: responses that are sampled in each of the sampler's dtypes.
        sampler: `vllm`, `hf`, or `auto`: vLLM where it is installed.
        dtypes: of sampler and learner, of `fp32`, `fp16`, `bf16`.
        device: of the learner, and of the sampler without vLLM.

    Raises:
        PlanError: a value that cannot be used.
    """

    model: Path
    prompts: Path | None = None
    count: int = 32
    max_new_tokens: int = 256
    temperature: float = 1.0
    sampler: str = "auto"
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    seed: int = 0

    def __post_init__(self) -> None:
        conflicts = [conflict for conflict in self._conflicts() if conflict is not None]
        if conflicts:
            raise PlanError(conflicts)

    def _conflicts(self) -> list[Conflict | None]:
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        has_config = (self.model / "config.json").is_file()
        fix = "give the path of a model that is on this machine"
        return [
            None if has_config else Conflict("MODEL", self.model, "no config.json there", fix),
            Conflict("--mode", unknown, "no such dtype", "use fp32, fp16, bf16") if unknown else None,
            None if self.dtypes else Conflict("--mode", "", "none", "use fp32, fp16, bf16"),
            None if self.count > 0 else Conflict("--count", self.count, "nothing to sample", "use at least 1"),
            None
            if self.max_new_tokens > 0
            else Conflict("--max-new-tokens", self.max_new_tokens, "no response", "use at least 1"),
            None if self.temperature > 0 else Conflict("--temperature", self.temperature, "no sampling", "use 1"),
            Conflict("--sampler", self.sampler, "vLLM is not installed here", "use hf")
            if self.sampler == "vllm" and not vllm_sampler.installed()
            else None,
        ]

    @property
    def uses_vllm(self) -> bool:
        return self.sampler == "vllm" or (self.sampler == "auto" and vllm_sampler.installed())


def examine(request: ProbeRequest, phases: Phases = silent) -> ProbeResult:
    """Measure the mismatch of every pair of dtypes and the range of activations and gradients, and judge both.

    Responses are sampled once in each of the sampler's dtypes and scored in each of the learner's. Ranges are those of
    an FP32 run, so that an overflow is seen and not suffered.

    Raises:
        PlanError: the model cannot be loaded, or there is nothing to ask it.
    """
    started = time.monotonic()
    config = AutoConfig.from_pretrained(request.model)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    prompts = read_prompts(request.prompts, request.count, tokenizer)
    sampling = Sampling(request.temperature, request.max_new_tokens, _stop_ids(request.model, tokenizer), request.seed)
    probe = _Probe(request, prompts, sampling, phases, batch_tokens=_batch_tokens(config))
    # vLLM first: it gives its memory back before the model is loaded here.
    if request.uses_vllm:
        probe.sample_by_vllm()
    model = _loaded(request)
    if not request.uses_vllm:
        probe.sample_by_decoding(model)
    probe.look_at_ranges(model)
    probe.compare(model)
    return probe.result(model, config, started)


class _Probe:
    """What has been found so far."""

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
        """The dtype whose responses are looked at for ranges."""
        return next(dtype for dtype in ("fp32", "bf16", "fp16") if dtype in self.sampled)

    def sample_by_vllm(self) -> None:
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
                    advance=_giving_memory_back(advance, every=32),
                    watched=watched,
                )
            self.ranges |= watch.ranges()
            del cast
            _give_memory_back()

    def look_at_ranges(self, model: nn.Module) -> None:
        """Forward and backward in FP32. Attention by its parts: other kernels do not show their scores."""
        watch = RangeWatch(model)
        sequences = self.sampled[self.widest][:RANGE_SEQUENCES]
        model.requires_grad_(True)
        phase = self.phases("activations and gradients in fp32", len(sequences))
        with _by_its_parts(model), watch.during(FORWARD), phase as advance:
            policy_gradient(
                model,
                sequences,
                device=self.request.device,
                temperature=self.request.temperature,
                batch_tokens=self.batch_tokens // 4,
                advance=_giving_memory_back(advance, every=1),
            )
        model.requires_grad_(False)
        self.ranges |= watch.ranges()

    def compare(self, model: nn.Module) -> None:
        for learner in self.request.dtypes:
            cast = in_dtype(model, DTYPES[learner])
            for sampler, sampled in self.sampled.items():
                sequences = sampled if sampler == learner else sampled[:MIXED_SEQUENCES]
                scores = self._scores(cast, sequences, learner, self.batch_tokens, f"{learner} learns from {sampler}")
                self.pairs[f"{learner}/{sampler}"] = Pair.of(sequences, scores)
                if sampler == self.widest:
                    self.floors[learner] = self._floor(cast, sequences, scores, learner)
            del cast
            _give_memory_back()

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
            cost={"seconds": time.monotonic() - started, "memory_bytes": float(_peak_memory())},
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


def _loaded(request: ProbeRequest) -> nn.Module:
    dtype = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(request.model, **{dtype: torch.float32})
    except (ImportError, OSError, ValueError, RuntimeError) as problem:
        fix = "give a causal language model that transformers loads"
        raise PlanError([Conflict("MODEL", request.model, f"cannot be loaded: {problem}", fix)]) from problem
    loaded: nn.Module = model.to(request.device).requires_grad_(False).eval()
    return loaded


@contextmanager
def _by_its_parts(model: Any) -> Iterator[None]:
    """Compute attention and experts by operations of their own for a while."""
    names = [name for name in ("_attn_implementation", "_experts_implementation") if hasattr(model.config, name)]
    kept = {name: getattr(model.config, name) for name in names}
    try:
        for name in names:
            setattr(model.config, name, "eager")
        yield
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


def _batch_tokens(config: Any) -> int:
    vocabulary = int(config.get_text_config().vocab_size)
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary))


def _stop_ids(model: Path, tokenizer: Any) -> frozenset[int]:
    """What ends a response, as the model's generation settings, or else its tokenizer, say."""
    try:
        ends = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


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


def _giving_memory_back(advance: Advance, every: int) -> Advance:
    """Once in so many calls; a cache that grows by a token at a time leaves as much behind as it holds."""
    calls = count(1)

    def advanced(parts: int) -> None:
        advance(parts)
        if next(calls) % every == 0:
            _give_memory_back()

    return advanced


def _give_memory_back() -> None:
    """To the system: glibc keeps what was freed in pieces, most of a model's weights, and may not use it again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_memory() -> int:
    """The larger of this process's and its largest child's resident memory, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(1024 * int(resource.getrusage(one).ru_maxrss) for one in who)
