"""Intervals cover the truth as often as they say, and tests reject it no more often."""

import numpy as np
import pytest

from flowbp import statistics
from flowbp.statistics import interval, paired_p_value, weighted_mean

REPEATS = 300


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


def draw(rng, kind, prompts, seeds):
    """Scores [prompts * seeds] whose true mean is 0, with half of their variance between prompts, and the prompt of each."""
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
    values, prompts = np.array([1.0, 3.0, 10.0]), ["a", "b", "c"]
    assert weighted_mean(values, np.array([1.0, 1.0, 0.0])) == 2.0
    assert weighted_mean(values, np.array([0.25, 0.25, 0.5])) == 6.0
    low, high = interval(values, np.array([1.0, 1.0, 0.0]), prompts)
    assert 1.0 <= low <= high <= 3.0


def test_the_same_scores_give_the_same_numbers():
    scores, prompts = draw(np.random.default_rng(2), "normal", 20, 2)
    weights = np.ones(len(scores))
    assert interval(scores, weights, prompts) == interval(scores, weights, prompts)
    assert paired_p_value(scores, scores + 0.1, weights, prompts) == paired_p_value(scores, scores + 0.1, weights, prompts)


def test_what_cannot_be_estimated_is_not_a_number_and_a_constant_has_no_width():
    ones = np.ones(4)
    assert np.isnan(interval(np.arange(4.0), ones, ["a"] * 4)).all()
    assert np.isnan(paired_p_value(np.arange(4.0), ones, ones, ["a"] * 4))
    assert interval(ones, ones, ["a", "b", "c", "d"]) == (1.0, 1.0)
    assert paired_p_value(ones, ones, ones, ["a", "b", "c", "d"]) == 1.0
