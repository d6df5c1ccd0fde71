"""Plant samples of known age, and tell numerics from drift: real vLLM samples, verl's FSDP engine scores.

    python -m integration.bench.lag

The demo's model is trained on for a few updates, and each state of it samples with both sides in one dtype. The newest
state scores all. Its own samples are of lag 0, those of the state before of lag 1, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.diagnosis.drift import LagCurve
from fp16_patch.mismatch.statistics.by_lag import measure_by_lag
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.probe.sequences import Sampled, aligned
from integration.bench.command import Bench
from integration.bench.offline import demo_checkpoint, prompts, sample
from integration.bench.verl_learner import LearnerModel, scores
from integration.cpu.tiny_model import character_tokenizer
from integration.demo import make_model

# What a fit is given that has no fresh token.
FITTED = {"lags 1 to 4": (1, 2, 3, 4), "lags 1 and 2": (1, 2)}


@dataclass(frozen=True)
class Size:
    """What is put into models and samples.

    Attributes:
        lags: the oldest samples are so many versions old.
        problems: that each version is asked. ``responses``: to each of them.
        learning_rate: of the updates between two versions.
        model: what is put into the demo's model.
        dtypes: that are compared.
    """

    lags: int = 4
    problems: int = 32
    responses: int = 8
    learning_rate: float = 3e-6
    model: make_model.Effort = make_model.FULL
    dtypes: tuple[str, ...] = ("bf16", "fp16")


FULL = Size()
SMOKE = Size(lags=1, problems=2, responses=2, model=make_model.SMOKE, dtypes=("fp16",))


def versions(out: Path, seed: int, size: Size) -> list[Path]:
    """Make the model's states, each an update after the one before; the newest comes last."""
    from transformers import AutoModelForCausalLM

    base, tokenizer = demo_checkpoint(out, seed, size.model), character_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.0)
    made = []
    for version in range(size.lags + 1):
        if version:
            make_model.update(model, tokenizer, optimizer, seed=seed + version)
        path = out / f"version_{version}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        made.append(path)
    return made


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure mean |d| by lag in each dtype, what is taken for numerics, and a control of fresh samples alone."""
    *older, newest = versions(out / "models", seed, size)
    return {dtype: _in_dtype(dtype, older, newest, seed, size) for dtype in size.dtypes}


def _in_dtype(dtype: str, older: Sequence[Path], newest: Path, seed: int, size: Size) -> dict[str, Any]:
    asked = prompts(size.problems, size.responses)
    drawn = {lag: sample(path, dtype, seed + lag, asked) for lag, path in enumerate([newest, *reversed(older)])}
    # What a synchronous run would have seen: other samples of the newest state, and no other.
    control = sample(newest, dtype, seed + len(drawn), asked)
    everything = [sequence for sequences in drawn.values() for sequence in sequences]
    scored = scores(LearnerModel(newest), [*everything, *control], dtype)
    by_lag = _by_lag(everything, scored, [lag for lag, sequences in drawn.items() for _ in sequences])
    alone = _stats(control, scored[len(everything) :]).metrics(prefix="")["mean_abs"]
    curve = LagCurve.of(by_lag)
    fits = {name: LagCurve.of({lag: by_lag[lag] for lag in lags if lag in by_lag}) for name, lags in FITTED.items()}
    return {
        "by_lag": {str(lag): asdict(point) for lag, point in curve.points.items()},
        "control": alone,
        "numeric": _shown(curve),
        "fitted": {name: _shown(fit) for name, fit in fits.items()},
    }


def _by_lag(
    sequences: Sequence[Sampled], scored: Sequence[Sequence[float]], lag_of_sequence: Sequence[int]
) -> dict[int, MismatchStats]:
    sampler, learner, mask = aligned(sequences, scored[: len(sequences)])
    lags = torch.tensor(lag_of_sequence)[:, None].expand_as(mask).contiguous()
    return measure_by_lag(sampler, learner, mask, lags)[1]


def _stats(sequences: Sequence[Sampled], scored: Sequence[Sequence[float]]) -> MismatchStats:
    stats: MismatchStats = MismatchStats.from_log_probs(*aligned(sequences, scored))
    return stats


def _shown(curve: LagCurve) -> dict[str, Any] | None:
    return None if curve.numeric is None else asdict(curve.numeric)


def show(measured: Mapping[str, Any], console: Console) -> None:
    table = Table("lag", *measured, title="mean |d| by lag", title_justify="left")
    for lag in next(iter(measured.values()))["by_lag"]:
        table.add_row(lag, *(f"{found['by_lag'][lag]['mean_abs']:.2e}" for found in measured.values()))
    console.print(table)
    for dtype, found in measured.items():
        numeric = found["numeric"]["mean_abs"]
        console.print(f"{dtype}: lag 0 {numeric:.3e}, control {found['control']:.3e}: {numeric / found['control']:.3f}")
        for name, fit in found["fitted"].items():
            if fit is not None:
                console.print(f"  {name}: {fit['mean_abs']:.2e} [{fit['low']:.2e} … {fit['high']:.2e}]")


BENCH = Bench("lag", measure, show, FULL, SMOKE, folder="evidence")

if __name__ == "__main__":
    BENCH.main(__doc__)
