"""Names the mismatch as the frameworks name it.

Means are over finite tokens, or over sequences with finite tokens only; ``r = exp(d)``, ``R = exp(Σ_t d)``, and
``w = min(r, 2)``. Each equals the framework's own function on one batch, where every row has a token and every token is
finite, up to its dtype and the 1e-8 in the denominators of its means.

=============================================  ======================================================================
name                                           formula
=============================================  ======================================================================
rollout_corr/kl, k3_kl                         mean(−d), mean(r − 1 − d)
rollout_corr/training_ppl, training_log_ppl    mean over sequences of exp(−mean log π), of −mean log π
rollout_corr/rollout_ppl, rollout_log_ppl      the same of μ
rollout_corr/log_ppl_diff, log_ppl_abs_diff    mean over sequences of x = −mean d, of |x|
rollout_corr/log_ppl_diff_max, _min            the greatest, the least x
rollout_corr/ppl_ratio                         mean over sequences of exp x
rollout_corr/chi2_token, chi2_seq              mean r² − 1, mean R² − 1
rollout_corr/rollout_is_mean, _std, _min, _max of w, at the token level
rollout_corr/rollout_is_eff_sample_size        (mean w)² / mean w²
rollout_corr/rollout_is_ratio_fraction_high    share of tokens with r > 2
rollout_corr/rollout_is_ratio_fraction_low     share of tokens with r < 0.5
rollout_corr/rollout_is_seq_mean, _std, …      of the sequences' means of w; fraction_high and _low of their means of r
training/rollout_probs_diff_mean, _max, _std   of |p_learner − p_sampler|
training/rollout_probs_diff_valid              1 with a finite token, else 0
training/rollout_actor_probs_pearson_corr      corr(p_sampler, p_learner)
sampling/sampling_logp_difference/mean, max    mean |d|, max |d|
sampling/importance_sampling_ratio/…           min, mean, max of r
token_mult_prob_error                          mean exp|d|
gen_kl_error, policy_kl_error                  mean(r − 1 − d), mean(1/r − 1 + d)
js_divergence_error                            mean log cosh(d/2)
sampling_importance_ratio                      mean r
=============================================  ======================================================================

What depends on a user's setting is as the framework's default has it, or left out:

- verl's ``rollout_is_*`` are those of ``rollout_is="token"`` with the threshold 2.0, its default, before any
  ``rollout_is_batch_normalize``. Those of ``rollout_is="sequence"``, of an IcePop threshold (``rollout_is_oob_ratio``),
  ``rollout_is_batch_norm_factor`` and all ``rollout_rs_*`` are not here.
- TRL's ``importance_sampling_ratio`` is the ratio of its token-level modes before it is truncated or masked at
  ``vllm_importance_sampling_cap``; that of the sequence-level modes is not here.
- NeMo-RL's are those of the token-level ratio before truncation; its KL errors are those of
  ``reference_policy_kl_type="k3"``. ``is_oob_ratio`` and what compares the learner with its own past are not here.

Of several batches, verl's and TRL's loggers average the batches' figures; these are of all tokens together.
"""

from __future__ import annotations

import math

from fp16_patch.mismatch.statistics.figures import Figures
from fp16_patch.mismatch.statistics.moments import effective_share, mean, population_std, sample_std
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, TRUNCATION, bounded_ratio


def framework_names(stats: Figures, metrics: dict[str, float]) -> dict[str, float]:
    """Return every figure of the table; NaN where there is no finite token (or sequence) to take it from.

    Args:
        metrics: of the same tokens, see ``MismatchStats.metrics``, without a prefix.
    """
    return {
        **{f"rollout_corr/{name}": value for name, value in _verl_off_policy(stats, metrics).items()},
        **{f"rollout_corr/rollout_is_{name}": value for name, value in _verl_weights(stats).items()},
        **{f"rollout_corr/rollout_is_seq_{name}": value for name, value in _verl_sequence_weights(stats).items()},
        **{f"training/{name}": value for name, value in _verl_debug(stats, metrics).items()},
        **{f"sampling/{name}": value for name, value in _trl(stats, metrics).items()},
        **_nemo_rl(stats, metrics),
    }


def _verl_off_policy(stats: Figures, metrics: dict[str, float]) -> dict[str, float]:
    n = stats.weighed_sequences
    return {
        "kl": metrics["k1"],
        "k3_kl": metrics["k3"],
        "training_ppl": mean(stats.learner_ppl_sum, n),
        "training_log_ppl": mean(stats.learner_log_ppl_sum, n),
        "rollout_ppl": mean(stats.sampler_ppl_sum, n),
        "rollout_log_ppl": mean(stats.sampler_log_ppl_sum, n),
        "log_ppl_diff": mean(stats.log_ppl_diff_sum, n),
        "log_ppl_abs_diff": mean(stats.log_ppl_diff_abs_sum, n),
        "log_ppl_diff_max": stats.log_ppl_diff_max if n else math.nan,
        "log_ppl_diff_min": stats.log_ppl_diff_min if n else math.nan,
        "ppl_ratio": 1.0 + mean(stats.ppl_ratio_expm1_sum, n),
        "chi2_token": metrics["chi2_token"],
        "chi2_seq": metrics["chi2_seq"],
    }


def _verl_weights(stats: Figures) -> dict[str, float]:
    n = stats.weighed_tokens
    return {
        "mean": 1.0 + mean(stats.truncated_expm1_sum, n),
        "std": population_std(n, stats.truncated_expm1_sum, stats.truncated_expm1_square_sum),
        "min": min(TRUNCATION, bounded_ratio(stats.d_min)) if n else math.nan,
        "max": min(TRUNCATION, bounded_ratio(stats.d_max)) if n else math.nan,
        "eff_sample_size": effective_share(n, stats.truncated_expm1_sum, stats.truncated_expm1_square_sum),
        "ratio_fraction_high": mean(stats.ratio_above_2_count, n),
        "ratio_fraction_low": mean(stats.ratio_below_half_count, n),
    }


def _verl_sequence_weights(stats: Figures) -> dict[str, float]:
    n = stats.weighed_sequences
    least, greatest = (stats.sequence_weight_min, stats.sequence_weight_max) if n else (math.nan, math.nan)
    return {
        "mean": 1.0 + mean(stats.sequence_weight_sum, n),
        "std": sample_std(n, stats.sequence_weight_sum, stats.sequence_weight_square_sum),
        "max": 1.0 + greatest,
        "min": 1.0 + least,
        "max_deviation": max(greatest, -least),
        "fraction_high": mean(stats.sequence_weight_above_2_count, n),
        "fraction_low": mean(stats.sequence_weight_below_half_count, n),
    }


def _verl_debug(stats: Figures, metrics: dict[str, float]) -> dict[str, float]:
    n = stats.weighed_tokens
    spread = sample_std(n, stats.prob_abs_sum, stats.prob_difference_square_sum)
    return {
        "rollout_probs_diff_valid": float(stats.finite_tokens > 0),
        "rollout_probs_diff_max": metrics["prob_max_abs"],
        "rollout_probs_diff_mean": metrics["prob_mean_abs"],
        "rollout_probs_diff_std": spread if n == stats.finite_tokens else math.nan,
        "rollout_actor_probs_pearson_corr": metrics["pearson"],
    }


def _trl(stats: Figures, metrics: dict[str, float]) -> dict[str, float]:
    return {
        "sampling_logp_difference/mean": metrics["mean_abs"],
        "sampling_logp_difference/max": metrics["max_abs"],
        "importance_sampling_ratio/min": _capped_ratio(stats.d_min) if stats.finite_tokens else math.nan,
        "importance_sampling_ratio/mean": _mean_ratio(stats),
        "importance_sampling_ratio/max": _capped_ratio(stats.d_max) if stats.finite_tokens else math.nan,
    }


def _nemo_rl(stats: Figures, metrics: dict[str, float]) -> dict[str, float]:
    return {
        "token_mult_prob_error": metrics["token_mult_prob_error"],
        "gen_kl_error": metrics["k3"],
        "policy_kl_error": metrics["k3_reverse"],
        "js_divergence_error": mean(stats.js_sum, stats.weighed_tokens),
        "sampling_importance_ratio": _mean_ratio(stats),
    }


def _mean_ratio(stats: Figures) -> float:
    """mean r as TRL and NeMo-RL have it: where verl bounds the exponent, they do not."""
    return 1.0 + mean(stats.capped_expm1_sum, stats.weighed_tokens)


def _capped_ratio(d: float) -> float:
    return bounded_ratio(d, low=-math.inf, high=EXPONENT_CAP)
