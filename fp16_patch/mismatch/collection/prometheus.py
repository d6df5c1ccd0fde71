"""Shows the newest step of a run as gauges of Ray's metrics export, which Prometheus scrapes.

Every value is a gauge, counts over the run included: Ray's ``Counter`` cannot show a zero, and a resumed run's count
may step back.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

RAY_PREFIX = "ray_"
"""Ray puts it before every name it exports."""

PREFIX = "fp16_patch_"
EXPORTED_METRICS = ("mismatch/", "fp16/")
CRITIC = "fp16/critic/"

REPEAT_S = 5.0
"""Half of Ray's default report interval, ``metrics_report_interval_ms``."""

DESCRIPTIONS = {
    "step": "Step whose metrics were recorded last",
    "mismatch_step": "Step whose mismatch was measured last",
    "alerts": "Mismatch alerts now standing",
    "alert": "1 while the mismatch alert named by the label stands, absent otherwise",
    "coverage/tokens": "Sampled tokens of the step that were measured",
    "coverage/expected_tokens": "Sampled tokens of the step",
    "coverage/ranks": "Ranks whose measurements of the step arrived",
    "coverage/expected_ranks": "Ranks that take part in the step",
    "coverage/dropped": "Measurements of the step that were given up",
    "coverage/complete": "1 if every rank's measurements of the step arrived, else 0",
    "mismatch/tokens": "Sampled tokens of the step",
    "mismatch/sequences": "Sequences of the step with a sampled token",
    "mismatch/nonfinite_sampler": "Tokens where the sampler's log-probability is NaN or infinite",
    "mismatch/nonfinite_learner": "Tokens where the learner's log-probability is NaN or infinite",
    "mismatch/nonfinite_tokens": "Tokens where either log-probability is NaN or infinite",
    "mismatch/nonfinite_certain": "Of these, where the sampler's is NaN and the learner is certain of the token",
    "mismatch/positive_sampler": "Tokens where the sampler's log-probability is above 0, so that it is none",
    "mismatch/positive_learner": "Tokens where the learner's log-probability is above 0, so that it is none",
    "mismatch/mean_abs": "Mean |d| in nats, d = log-probability of the learner - of the sampler, r = exp(d)",
    "mismatch/max_abs": "Largest |d| of a token in nats",
    "mismatch/abs_p50": "Median of |d| in nats",
    "mismatch/abs_p90": "90 % quantile of |d| in nats",
    "mismatch/abs_p99": "99 % quantile of |d| in nats",
    "mismatch/abs_p99_9": "99.9 % quantile of |d| in nats",
    "mismatch/tail_1e_2": "Share of tokens with |d| above 0.01 nats, 0 to 1",
    "mismatch/tail_1e_1": "Share of tokens with |d| above 0.1 nats, 0 to 1",
    "mismatch/tail_1": "Share of tokens with |d| above 1 nat, 0 to 1",
    "mismatch/k1": "Estimator k1 of KL(sampler || learner), mean -d, in nats",
    "mismatch/k3": "Estimator k3 of KL(sampler || learner), mean r - 1 - d, in nats",
    "mismatch/k3_reverse": "Estimator k3 of KL(learner || sampler), mean 1 / r - 1 + d, in nats",
    "mismatch/is_mean": "Mean importance ratio r of a token",
    "mismatch/is_std": "Standard deviation of a token's importance ratio r",
    "mismatch/is_min": "Smallest importance ratio r of a token",
    "mismatch/is_max": "Largest importance ratio r of a token",
    "mismatch/ess": "Effective sample size of the tokens' importance ratios over their number, 0 to 1",
    "mismatch/chi2_token": "Mean r^2 - 1 over tokens, 0 where both sides agree",
    "mismatch/chi2_seq": "Mean exp(2 D) - 1 over sequences, D the sum of d, 0 where both sides agree",
    "mismatch/tis_clip_fraction": "Share of tokens with r above 2, 0 to 1",
    "mismatch/icepop_mask_fraction": "Share of tokens with r outside 0.5 to 5, 0 to 1",
    "mismatch/prob_mean_abs": "Mean absolute difference of the probabilities",
    "mismatch/prob_max_abs": "Largest absolute difference of a token's probabilities",
    "mismatch/pearson": "Correlation of the two probabilities, -1 to 1",
    "mismatch/log_prob_slope": "Slope of the learner's log-probabilities on the sampler's, 1 where both sides agree",
    "mismatch/log_prob_correlation": "Correlation of the two log-probabilities, -1 to 1",
    "mismatch/token_mult_prob_error": "Mean exp|d|, 1 where both sides agree",
    "mismatch/seq_mean_abs": "Mean |D| in nats, D the sum of d over a sequence",
    "mismatch/seq_max_abs": "Largest |D| of a sequence in nats",
    "mismatch/seq_is_mean": "Mean importance ratio exp(D) of a sequence",
    "mismatch/seq_ess": "Effective sample size of the sequences' importance ratios over their number, 0 to 1",
    "mismatch/seq_mask_fraction": "Share of sequences with exp(D) outside 0.5 to 2, 0 to 1",
    "mismatch/noise_floor_tokens": "Tokens that the learner scored twice, absent in steps where it does not",
    "mismatch/noise_floor_mean_abs": "Mean |d| in nats of the learner against itself",
    "mismatch/noise_floor_max_abs": "Largest |d| in nats of the learner against itself",
    "mismatch/lag_mean": "Mean number of weight versions by which a token's weights are older than the learner's",
    "mismatch/lag_min": "Smallest lag of a token, in weight versions",
    "mismatch/lag_max": "Largest lag of a token, in weight versions",
    "mismatch/lag_known": "Share of tokens whose lag is known, 0 to 1",
    "mismatch/lag0_tokens": "Tokens that were sampled with the learner's weights",
    "mismatch/lag0_mean_abs": "Mean |d| in nats of tokens that were sampled with the learner's weights",
    "mismatch/lag0_max_abs": "Largest |d| in nats of a token that was sampled with the learner's weights",
    "mismatch/lag0_abs_p99": "99 % quantile of |d| in nats of tokens that were sampled with the learner's weights",
    "mismatch/lag0_k1": "Estimator k1 of KL(sampler || learner) in nats where both hold the same weights",
    "mismatch/lag0_k3": "Estimator k3 of KL(sampler || learner) in nats where both hold the same weights",
    "mismatch/lag0_ess": "Effective sample size over the number of tokens where both hold the same weights, 0 to 1",
    "mismatch/lag0_seq_mean_abs": "Mean |D| in nats of the sequences' parts where both hold the same weights",
    "mismatch/stale_tokens": "Tokens that were sampled with older weights than the learner's",
    "mismatch/stale_mean_abs": "Mean |d| in nats of tokens that were sampled with older weights than the learner's",
    "mismatch/coverage": "Share of the step that was measured in time, 0 to 1",
    "mismatch/records_dropped": "Measurements and records lost since the trainer's start",
    "fp16/loss_scale": "Loss scale, the smallest of the step's updates",
    "fp16/step_skipped": "Share of the step's updates that were skipped, 0 to 1",
    "fp16/skipped_total": "Updates skipped since the run began",
    "fp16/consecutive_skips": "Updates skipped since the last one that was taken",
    "fp16/retries": "Attempts of the step's updates that were repeated at a lower loss scale",
    "fp16/retries_total": "Attempts repeated at a lower loss scale since the run began",
    "fp16/gradient_headroom": "65504 over the largest scaled gradient, in steps with an update that was looked at",
    "fp16/underflow": "Share of gradients that are zero or subnormal, in rows that are not zero throughout, 0 to 1",
    "fp16/zeros": "Share of gradients that are zero, in rows that are not zero throughout, 0 to 1",
    "fp16/zero_rows": "Share of the rows of gradients that are zero throughout, 0 to 1",
}
"""HELP text by the record's name, a group of layers left out. ASCII only: Ray raises UnicodeEncodeError for others."""


class Series(NamedTuple):
    """Names a gauge as the record does; ``alert`` is the label of the gauge of that name, empty for every other."""

    name: str
    alert: str = ""


class PrometheusSink:
    """Sets gauges from record lines; to be created and called in a Ray process.

    What stands is the newest line of `mismatch.jsonl` joined with the newest of `steps.jsonl`. A value that the newest
    line lacks, or has as NaN or infinite, is withdrawn, and Prometheus shows a gap rather than the value of an earlier
    step. Lines are told apart by ``state``, which only those of `mismatch.jsonl` have.

    Ray exports a gauge once for each time it is set (ray-project/ray#56405; since #64633 for 20 s), and a step takes
    minutes: a thread sets what stands again every ``REPEAT_S`` until ``close`` or the end of the process.

    Args:
        run: the label ``run`` of every series; Ray takes ASCII only, so other characters are escaped as in Python.
    """

    def __init__(self, run: str) -> None:
        self._run = run.encode("ascii", "backslashreplace").decode()
        self._gauges: dict[str, Any] = {}
        self._newest: dict[bool, dict[Series, float]] = {}
        self._standing: dict[Series, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="fp16_patch_prometheus", daemon=True).start()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take a line of `mismatch.jsonl` or of `steps.jsonl` in place of the one before it."""
        with self._lock:
            self._newest["state" in line] = samples(line)
            self._replace(self._newest.get(False, {}) | self._newest.get(True, {}))

    def close(self) -> None:
        """Withdraw every series."""
        self._closed.set()
        with self._lock:
            self._replace({})

    def _replace(self, standing: dict[Series, float]) -> None:
        """Show these series. Those that are gone are set to NaN, which Ray drops at once instead of after 20 s."""
        withdrawn = dict.fromkeys(self._standing.keys() - standing.keys(), math.nan)
        self._standing = standing
        self._set({**withdrawn, **standing})

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._lock:
                self._set(self._standing)

    def _set(self, values: dict[Series, float]) -> None:
        for series, value in values.items():
            tags = {"run": self._run, "alert": series.alert} if series.alert else {"run": self._run}
            self._gauge(series.name, tuple(tags)).set(value, tags)

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(gauge_name(name), description(name), labels)
        return self._gauges[name]


def samples(line: Mapping[str, Any]) -> dict[Series, float]:
    """Return the finite values of a record line: of its metrics ``mismatch/*`` and ``fp16/*``."""
    measured = "state" in line
    metrics = line.get("metrics", {})
    values = {
        "mismatch_step" if measured else "step": line.get("step"),
        **{name: value for name, value in metrics.items() if name.startswith(EXPORTED_METRICS)},
        **{f"coverage/{name}": value for name, value in line.get("coverage", {}).items()},
    }
    numbers = {Series(name): float(value) for name, value in values.items() if isinstance(value, int | float)}
    finite = {series: value for series, value in numbers.items() if math.isfinite(value)}
    return finite | (_alert_samples(line.get("alerts", [])) if measured else {})


def _alert_samples(alerts: list[dict[str, Any]]) -> dict[Series, float]:
    standing = {Series("alert", alert["name"]): 1.0 for alert in alerts}
    return {Series("alerts"): float(len(alerts)), **standing}


def gauge_name(name: str) -> str:
    """``mismatch/mean_abs`` → fp16_patch_mismatch_mean_abs, ``fp16/loss_scale`` → fp16_patch_loss_scale."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name.removeprefix("fp16/"))


def exported_name(name: str) -> str:
    """Return the name in Prometheus."""
    return RAY_PREFIX + gauge_name(name)


def description(name: str) -> str:
    """Say what the gauge means and its unit, in ASCII; of a metric that is not described here, its name."""
    if name.startswith(CRITIC):
        return f"{description('fp16/' + name.removeprefix(CRITIC))}, of the critic"
    of_all, _, group = name.rpartition("/")
    if of_all in DESCRIPTIONS:
        return f"{DESCRIPTIONS[of_all]}: {group}"
    return DESCRIPTIONS.get(name, name.encode("ascii", "backslashreplace").decode())
