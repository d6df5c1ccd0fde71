"""Serves the driver: ends each step of the monitor, and gets the step's figures for the framework."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.part import Message, Part, join
from fp16_patch.mismatch.collection.patience import Patience
from fp16_patch.mismatch.collection.root import root_of
from fp16_patch.mismatch.record.reading import STEPS
from fp16_patch.mismatch.statistics.by_lag import Lags, of_numerics, staleness_names
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

MAX_PENDING = 64
FLUSH_TIMEOUT_S = 10.0
ROOT_SHARE = 0.75
"""Of the time that the driver waits, what the root may spend on waiting for others."""

Annotate = Callable[[int, Mapping[str, float]], Mapping[str, Any]]


class Monitor:
    """Never raises, and never waits longer than it may: an error is one warning, and training goes on.

    A root that does not answer, and a rank that does not report, cost one timeout, see ``Patience``.

    Args:
        out_dir: where `plan.json`, `ledger.json`, `mismatch.jsonl` and `steps.jsonl` go.
        run: name by which ranks report; by default a new one. ``actors.job_run()`` for ranks that cannot be told: a
            root that an earlier trainer of the job has left begins anew then.
        timeout_s: the longest that the end of a step waits for its figures.
        sinks: ``module:class`` of what gets each line besides the disk.
        annotate: is given a step and its ``mismatch/*``, returns what else belongs on the step's line (alerts). Where
            lags are known, figures of the gap are those of lag 0, and missing without tokens of lag 0.

    Attributes:
        run: what ``Observer`` needs to know.
        round: number of the open round, which ends with ``end_step``; ``Observer.observe`` needs it.
        attempt: tells this trainer's lines from those of one that it resumes.
    """

    def __init__(
        self,
        out_dir: Path,
        run: str | None = None,
        timeout_s: float = 2.0,
        sinks: tuple[str, ...] = (),
        annotate: Annotate | None = None,
    ) -> None:
        self.attempt = uuid.uuid4().hex
        self.round = 0
        self._timeout_s = timeout_s
        self._annotate = annotate
        self._local: list[Part] = []
        self._expected: tuple[int | None, int | None] = (None, None)
        self._guard = Guard(logger, "the mismatch monitor failed, training goes on without it")
        self._late = Guard(logger, "the mismatch monitor is late, training does not wait for it")
        self._out_dir, self._sinks = out_dir.absolute(), sinks
        self._root: Any = None
        self._pending: list[Any] = []
        self._dropped = 0
        self._unwritten = 0
        self._unanswered: list[Any] = []
        self._patience_with_root, self._patience_with_ranks = Patience(), Patience()
        self.run = run or self._guard.run(actors.new_run) or ""
        self._guard.run(self._begin)

    def observe(
        self,
        sampler: Tensor,
        learner: Tensor,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Add tokens to the open round, where the driver has both sides; see ``MismatchStats.from_log_probs``."""
        self._guard.run(lambda: self.add(MismatchStats.from_log_probs(sampler, learner, mask, sequence_ids, token_ids)))

    def add(self, stats: MismatchStats, noise_floor: MismatchStats | None = None, by_lag: Lags | None = None) -> None:
        """Add what the driver has measured itself to the open round."""
        self._local.append(Part(stats, noise_floor, by_lag=by_lag or {}))

    def expect(self, tokens: int | None, ranks: int | None = None) -> None:
        """Say what the open round has to cover: so many sampled tokens, or so many ranks where these are unknown."""
        self._expected = tokens, ranks

    def end_step(
        self, step: int, metrics: dict[str, Any], extra: Mapping[str, Any] | None = None
    ) -> MismatchStats | None:
        """Put the step's `mismatch/*` into the framework's metrics, and all of them on record.

        The same figures go under the names that frameworks give them, unless the framework has reported those itself.

        Args:
            extra: more fields for the step's line.

        Returns:
            The step's statistics; None if nothing was measured, or the figures are not there in time. Those that come
            later are on record.
        """
        question = self.round, *self._expected, self._guard.run(self._take_local)
        self.round, self._expected = self.round + 1, (None, None)
        return self._guard.run(lambda: self._end_step(step, metrics, dict(extra or {}), question))

    def pass_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Put a step on record in which no rank was to observe; the round stays open."""
        self._expected = (None, None)
        self._guard.run(lambda: self._record_metrics(step, metrics))

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append a line to a file of the record."""
        self._guard.run(lambda: self._send("append", name, record))

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Replace a whole JSON document."""
        self._guard.run(lambda: self._send("write", name, document))

    def flush(self) -> None:
        """Wait, a bounded time, until what was measured so far is on disk."""
        self._guard.run(lambda: self._in_time("flush", limit_s=FLUSH_TIMEOUT_S, others_s=FLUSH_TIMEOUT_S))

    def _begin(self) -> None:
        if self.run:
            self._root = root_of(self.run, self._out_dir, self._sinks)
            self._send("begin", str(self._out_dir))

    def _take_local(self) -> Message | None:
        local, self._local = self._local, []
        return join(local).pack() if local else None

    def _end_step(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any], question: tuple[Any, ...]
    ) -> MismatchStats | None:
        part, coverage = self._gather(question)
        measured = part.metrics()
        covered = _share(coverage)
        measured |= {} if covered is None else {"mismatch/coverage": covered}
        metrics.update(measured)
        named = part.stats.aliases() | staleness_names(measured) if part.stats.tokens else {}
        for name, value in named.items():
            metrics.setdefault(name, value)
        if lost := self._dropped + self._unwritten:
            metrics["mismatch/records_dropped"] = float(lost)
        annotate = self._annotate
        if annotate is not None and part.stats.tokens:
            extra |= self._guard.run(lambda: annotate(step, of_numerics(measured, part.by_lag))) or {}
        self._send("close", *question, {**self._stamp(step), **extra})
        self._record_metrics(step, metrics)
        return part.stats if part.stats.tokens else None

    def _record_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._send("append", STEPS, {**self._stamp(step), "metrics": _plain_numbers(metrics)})

    def _stamp(self, step: int) -> dict[str, Any]:
        return {"step": step, "time": time.time(), "attempt": self.attempt}

    def _gather(self, question: tuple[Any, ...]) -> tuple[Part, dict[str, Any]]:
        """Return the round and its coverage; without an answer, what the driver itself has measured."""
        ranks_s = self._patience_with_ranks.wait_s(self._timeout_s)
        answer = self._guard.run(lambda: self._in_time("gather", *question, limit_s=self._timeout_s, others_s=ranks_s))
        if answer is None:
            _, tokens, _, local = question
            part = join([]) if local is None else Part.unpack(local)
            return part, {"tokens": part.stats.tokens, "expected_tokens": tokens}
        coverage: dict[str, Any] = answer["coverage"]
        if coverage["complete"]:
            self._patience_with_ranks.answered()
        else:
            self._patience_with_ranks.disappointed()
        if answer["recovered"]:
            self._patience_with_ranks.answered_late()
        self._dropped += coverage["dropped"]
        self._unwritten = answer["unwritten"]
        return Part.unpack(answer["part"]), coverage

    def _in_time(self, method: str, *arguments: Any, **limits: float) -> Any:
        """Ask as ``_ask`` does; return None without an answer in time."""
        try:
            return self._ask(method, *arguments, **limits)
        except TimeoutError as late:
            self._late.warn(late)
            return None

    def _ask(self, method: str, *arguments: Any, limit_s: float, others_s: float) -> Any:
        """Return the root's answer; None if it has no room for the question.

        Args:
            limit_s: the longest to wait for the root.
            others_s: the longest that the root may wait for others meanwhile.

        Raises:
            TimeoutError: no answer in time.
            RayActorError: the root is dead.
        """
        import ray

        self._forget_done()
        wait_s = self._patience_with_root.wait_s(limit_s)
        call = self._call(method, *arguments, ROOT_SHARE * min(wait_s, others_s))
        if call is None:
            return None
        answered, _ = ray.wait([call], timeout=wait_s)
        if not answered:
            self._unanswered.append(call)
            self._patience_with_root.disappointed()
            raise TimeoutError(f"no answer from {actors.root_name(self.run)} within {wait_s} s")
        self._pending.remove(call)
        answer = self._result(call)
        self._patience_with_root.answered()
        return answer

    def _send(self, method: str, *arguments: Any) -> None:
        if self._call(method, *arguments) is None and self._root is not None:
            self._dropped += 1

    def _call(self, method: str, *arguments: Any) -> Any:
        """Make a call and return it; None where too many are under way, or there is no root."""
        if self._root is None:
            return None
        self._forget_done()
        if len(self._pending) >= MAX_PENDING:
            return None
        call = getattr(self._root, method).remote(*arguments)
        self._pending.append(call)
        return call

    def _forget_done(self) -> None:
        import ray

        if self._pending:
            done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            for call in done:
                self._guard.run(partial(self._result, call))  # so that a failure is heard of
                if call in self._unanswered:
                    self._unanswered.remove(call)
                    self._patience_with_root.answered_late()

    def _result(self, call: Any) -> Any:
        import ray
        from ray.exceptions import ActorDiedError

        try:
            return ray.get(call)
        except ActorDiedError:
            # Dead for good. A former trainer's root dies with it, and its name may lead there for a moment longer.
            self._root = root_of(self.run, self._out_dir, self._sinks)
            raise


def _share(coverage: Mapping[str, Any]) -> float | None:
    """Return which share of the expected tokens, or ranks, is there; None where nobody expected anything."""
    for quantity in ("tokens", "ranks"):
        expected = coverage.get(f"expected_{quantity}")
        if expected:
            return float(coverage[quantity] / expected)
    return None


def _plain_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) or hasattr(value, "item")
    }
