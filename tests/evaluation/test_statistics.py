"""Intervals cover the truth as often as they say, and tests reject it no more often."""

import numpy as np
import pytest
from scipy import stats

from flowbp.evaluation import statistics
from flowbp.evaluation.statistics import interval, paired_p_value, weighted_mean

REPEATS = 300


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


def draw(rng, kind, prompts, seeds):
    """Scores [prompts * seeds] whose true mean is 0, with half of their variance between prompts, and the prompt of
    each.
    """
    between = {"normal": rng.normal, "skewed": lambda size: rng.exponential(size=size) - 1}[kind](size=prompts)
    scores = between[:, None] + rng.normal(size=(prompts, seeds))
    return scores.ravel(), np.repeat([f"prompt {i}" for i in range(prompts)], seeds)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_intervals_cover_the_true_mean(kind, few_resamples):
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(REPEATS):
        scores, prompts = draw(rng, kind, prompts=40, seeds=4)
        low, high = interval(scores, np.ones(len(scores)), prompts)
        covered += low <= 0 <= high
        low, high = interval(scores, np.ones(len(scores)), np.arange(len(scores)).astype(str))
        naive += low <= 0 <= high
    assert 0.90 <= covered / REPEATS <= 0.98
    assert naive / REPEATS < 0.85, "seeds of one prompt, taken for independent prompts, make the interval too narrow"


def test_paired_intervals_cover_the_true_change_and_the_test_holds_its_level(few_resamples):
    rng = np.random.default_rng(1)
    covered = rejected = found = 0
    for _ in range(REPEATS):
        before, prompts = draw(rng, "skewed", prompts=40, seeds=2)
        noise = 0.3 * draw(rng, "normal", prompts=40, seeds=2)[0]
        weights = np.ones(len(before))
        low, high = interval(noise + 0.2, weights, prompts)
        covered += low <= 0.2 <= high
        rejected += paired_p_value(before, before + noise, weights, prompts) < 0.05
        found += paired_p_value(before, before + noise + 0.2, weights, prompts) < 0.05
    assert 0.90 <= covered / REPEATS <= 0.98
    assert 0.02 <= rejected / REPEATS <= 0.08
    assert found / REPEATS > 0.8


def test_weights_choose_and_balance_samples():
    values = np.array([1.0, 3.0, 10.0])
    assert weighted_mean(values, np.array([1.0, 1.0, 0.0])) == 2.0
    assert weighted_mean(values, np.array([0.25, 0.25, 0.5])) == 6.0
    low, high = interval(np.array([1.0, 3, 1, 3, 1, 3, 10]), np.array([1.0] * 6 + [0]), [*SIX, "not asked"])
    assert 1.0 <= low <= high <= 3.0


def test_the_same_scores_give_the_same_numbers():
    rng = np.random.default_rng(2)
    scores, prompts = draw(rng, "normal", 20, 2)
    weights, after = np.ones(len(scores)), scores + rng.normal(size=len(scores))
    assert interval(scores, weights, prompts) == interval(scores, weights, prompts)
    p, again = (paired_p_value(scores, after, weights, prompts) for _ in range(2))
    assert p == again and 0.05 < p < 0.95, "that of a constant change would be the least there is"


@pytest.mark.parametrize("prompts", [6, 8, 15])
def test_intervals_of_few_prompts_are_as_wide_as_a_t_interval(prompts, few_resamples):
    rng, widths = np.random.default_rng(3), []
    for _ in range(40):
        scores = rng.normal(size=prompts)
        low, high = interval(scores, np.ones(prompts), [str(i) for i in range(prompts)])
        by_t = stats.t.interval(0.95, prompts - 1, scale=scores.std(ddof=1) / prompts**0.5)
        widths.append((high - low) / (by_t[1] - by_t[0]))
    assert 0.88 <= np.mean(widths) <= 1.05, "a plain bootstrap of six prompts is .7 as wide"


SIX = ["a", "b", "c", "d", "e", "f"]
SCORES = {
    "nothing": [],
    "a single prompt": [1.0],
    "two prompts": [1.0, 2.0],
    "equal scores": [0.1] * 9,
    "one success": [0.0] * 39 + [1.0],
    "one failure": [1.0] * 5 + [0.0],
    "ties": [1.0, 1, 1, -1, -1, -1, 0, 0],
    "an outlier": [1e6] + [0.0] * 19,
    "tiny": [1e-30 * i for i in range(9)],
    "all but equal": [1e8 + 1e-7 * i for i in range(9)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_degenerate_scores_give_an_ordered_interval_or_none_and_no_warning(scores):
    values, prompts, weights = np.array(scores), [str(i) for i in range(len(scores))], np.ones(len(scores))
    low, high = interval(values, weights, prompts)
    p = paired_p_value(np.zeros(len(values)), values, weights, prompts)
    assert np.isnan([low, high]).all() if len(values) < 6 else low <= weighted_mean(values, weights) <= high
    assert np.isnan(p) if len(values) < 2 else 2.0 ** (1 - len(values)) * 0.99 <= p <= 1


def test_what_cannot_be_estimated_is_not_a_number_and_a_constant_has_no_width():
    assert np.isnan(interval(np.arange(12.0), np.ones(12), ["a"] * 12)).all(), (
        "one prompt tells nothing of others, whatever its seeds"
    )
    assert np.isnan(paired_p_value(np.arange(4.0), np.ones(4), np.ones(4), ["a"] * 4))
    low, high = interval(np.full(15, 0.1), np.ones(15), [*SIX, *SIX, "a", "a", "b"])
    assert low == high == pytest.approx(0.1)
    assert paired_p_value(np.ones(6), np.ones(6), np.ones(6), SIX) == 1.0
    assert (
        np.isnan(interval(np.arange(5.0), np.ones(5), SIX[:5])).all()
        and interval(np.arange(6.0), np.ones(6), SIX)[0] > 0
    )
