"""Means with intervals, and paired tests, when several images show the same prompt.

Scores of one prompt under several seeds are not independent draws from the world of prompts, so the unit that is
resampled is the prompt (the cluster bootstrap: Davison and Hinkley 1997, section 3.8). A sample i has a score x_i and a
weight u_i:

    mean = sum_i u_i x_i / sum_i u_i

interval        95 % bootstrap, bias-corrected and accelerated (BCa: Efron 1987), over whole prompts;
`scipy.stats.bootstrap`. The spread of
                n prompts is too narrow by sqrt((n - 1) / n), and z is less than t: a raised level makes up for both
                (Hesterberg 2015)
paired_p_value  sign-flip permutation test of equal means: without a change, a prompt's difference is as likely d as -d
(Fisher 1935);
                p = (1 + #{|T*| >= |T|}) / (1 + resamples), never 0 (Phipson and Smyth 2010);
                `scipy.stats.permutation_test`

Both draw from a generator with a fixed seed: the same scores give the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["interval", "paired_p_value", "weighted_mean"]

RESAMPLES = 9999
BATCH = 1000  # resamples held in memory at once


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """sum_i u_i x_i / sum_i u_i of values, weights [n]; nan for none."""
    return float((weights * values).sum() / weights.sum()) if len(values) else float("nan")


def interval(
    values: np.ndarray, weights: np.ndarray, prompts: Sequence[str], level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the weighted mean of finite values [n]; samples with equal `prompts` are resampled together.

    Where n prompts are too few to bear an interval of this level, it is (nan, nan): all of them lie on one side of
    their median with probability 2^(1 - n), so 95 % takes six. Prompts that all have the same mean give that mean
    twice: no variation was seen, which is not to say that there is none.
    """
    sums, totals = by_prompt(values, weights, prompts)
    if 2.0 ** (1 - len(sums)) > 1 - level:
        return float("nan"), float("nan")
    means = sums / totals
    if np.ptp(means) <= 1e-12 * np.abs(means).max():  # rounding of equal scores
        return (weighted_mean(values, weights),) * 2
    for method in (
        "BCa",
        "percentile",
    ):  # BCa is undefined where every resample lies on one side of the mean, as a few prompts can
        with (
            warnings.catch_warnings(category=stats.DegenerateDataWarning, action="ignore"),
            np.errstate(invalid="ignore"),
        ):
            low, high = stats.bootstrap(
                (sums, totals),
                ratio,
                paired=True,
                method=method,
                n_resamples=RESAMPLES,
                batch=BATCH,
                confidence_level=expanded(level, len(sums)),
                rng=np.random.default_rng(0),
            ).confidence_interval
        if np.isfinite((low, high)).all():
            break
    return float(low), float(high)


def paired_p_value(before: np.ndarray, after: np.ndarray, weights: np.ndarray, prompts: Sequence[str]) -> float:
    """Two-sided p of the hypothesis that before, after [n] have equal weighted means; nan for a single prompt, which
    cannot be tested.

    No p is below 2^(1 - prompts): five prompts or fewer cannot show a change at the level of 5 %.
    """
    old, _ = by_prompt(before, weights, prompts)
    new, _ = by_prompt(after, weights, prompts)
    if len(old) < 2:
        return float("nan")
    return float(
        stats.permutation_test(
            (old, new),
            lambda x, y, axis: np.abs((y - x).mean(axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=RESAMPLES,
            batch=BATCH,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def expanded(level: float, prompts: int) -> float:
    """The level at which a bootstrap of n prompts is as wide as a t interval of `level`: 1 - 2 Phi(-sqrt(n / (n - 1))
    t_{n - 1}).
    """
    t = stats.t.ppf((1 + level) / 2, prompts - 1)
    return float(1 - 2 * stats.norm.cdf(-t * np.sqrt(prompts / (prompts - 1))))


def by_prompt(values: np.ndarray, weights: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of u_i x_i and of u_i over the samples of each prompt that has any weight, in the order of the prompts'
    names.
    """
    kept = weights > 0
    _, index = np.unique(np.asarray(prompts)[kept], return_inverse=True)
    return np.bincount(index, (weights * values)[kept]), np.bincount(index, weights[kept])


def ratio(sums: np.ndarray, totals: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / totals.sum(axis)
