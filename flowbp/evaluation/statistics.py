"""Means with intervals, and paired tests, when several images show the same prompt.

Scores of one prompt under several seeds are not independent draws from the world of prompts. The unit that is resampled
is therefore the prompt (cluster bootstrap: Davison and Hinkley 1997, section 3.8). Sample i has a score x_i and a
weight u_i:

    mean = sum_i u_i x_i / sum_i u_i

interval: a 95 % bootstrap over whole prompts, bias-corrected and accelerated (BCa: Efron 1987), by
`scipy.stats.bootstrap`. The spread of n prompts is too narrow by sqrt((n - 1) / n), and a normal quantile is less than
Student's. Asking the bootstrap for a higher level makes up for both (Hesterberg 2015).

paired_p_value: a sign-flip permutation test of equal means, by `scipy.stats.permutation_test`. Without a change, the
difference of a prompt is as likely d as -d (Fisher 1935). p = (1 + #{|T*| >= |T|}) / (1 + resamples) is never 0
(Phipson and Smyth 2010).

Both draw from a generator with a fixed seed: the same scores give the same numbers.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999
BATCH = 1000  # resamples held in memory at once


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """sum_i u_i x_i / sum_i u_i of values, weights [n]; nan for no values."""
    return float((weights * values).sum() / weights.sum()) if len(values) else float("nan")


def interval(values: np.ndarray, weights: np.ndarray, prompts: list[str], level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the weighted mean of finite values [n]; samples with equal `prompts` are resampled together.

    (nan, nan) where n prompts are too few for an interval of this level. All n lie on one side of their median with
    probability 2^(1 - n), so 95 % takes six. Prompts that all have the same mean give that mean twice: no variation was
    seen, which does not prove that there is none.
    """
    sums, totals = by_prompt(values, weights, prompts)
    if 2.0 ** (1 - len(sums)) > 1 - level:
        return float("nan"), float("nan")
    means = sums / totals
    if np.ptp(means) <= 1e-12 * np.abs(means).max():  # equal up to rounding
        return (weighted_mean(values, weights),) * 2
    options = {"paired": True, "n_resamples": RESAMPLES, "batch": BATCH, "confidence_level": expanded(level, len(sums))}
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        # BCa is undefined where every resample lies on one side of the mean, as happens with few prompts.
        for method in ("BCa", "percentile"):
            rng = np.random.default_rng(0)
            low, high = stats.bootstrap((sums, totals), ratio, method=method, rng=rng, **options).confidence_interval
            if np.isfinite((low, high)).all():
                break
    return float(low), float(high)


def mean_of_runs(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one number of each training run, with a 95 % t interval; nan for a single run's interval."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def paired_p_value(before: np.ndarray, after: np.ndarray, weights: np.ndarray, prompts: Sequence[str]) -> float:
    """Two-sided p of the hypothesis that before, after [n] have equal weighted means.

    nan for a single prompt, which cannot be tested. No p is below 2^(1 - prompts), so five prompts or fewer cannot show
    a change at the level of 5 %.
    """
    old, new = (by_prompt(values, weights, prompts)[0] for values in (before, after))
    if len(old) < 2:
        return float("nan")
    options = {"permutation_type": "samples", "alternative": "greater", "n_resamples": RESAMPLES, "batch": BATCH}
    test = stats.permutation_test((old, new), absolute_change, rng=np.random.default_rng(0), **options)
    return float(test.pvalue)


def expanded(level: float, prompts: int) -> float:
    """The level at which a bootstrap of n prompts is as wide as a t interval of `level`:

    1 - 2 Phi(-sqrt(n / (n - 1)) t_{n - 1})
    """
    t = stats.t.ppf((1 + level) / 2, prompts - 1)
    return float(1 - 2 * stats.norm.cdf(-t * np.sqrt(prompts / (prompts - 1))))


def by_prompt(values: np.ndarray, weights: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of u_i x_i and of u_i over the samples of each prompt with any weight, in alphabetical order of prompts."""
    kept = weights > 0
    _, index = np.unique(np.asarray(prompts)[kept], return_inverse=True)
    return np.bincount(index, (weights * values)[kept]), np.bincount(index, weights[kept])


def ratio(sums: np.ndarray, totals: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / totals.sum(axis)


def absolute_change(old: np.ndarray, new: np.ndarray, axis: int) -> np.ndarray:
    return np.abs((new - old).mean(axis))
