"""Quadrature rules: exactness, sums, signs, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp import quadrature
from flowbp.quadrature import check_sigmas, euler, lagrange, lagrange_supports, leap, rescale_factor, uniform


@st.composite
def segments(draw):
    """Noise levels, an interval [start, stop) of their steps, and an order."""
    gaps = draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=30))
    sigmas = np.append(np.cumsum(gaps)[::-1], 0.0) / np.sum(gaps)
    start = draw(st.integers(0, len(gaps) - 1))
    stop = draw(st.integers(start + 1, len(gaps)))
    return sigmas, start, stop, draw(st.integers(1, 5))


@given(segments())
def test_lagrange_is_exact_for_polynomials_below_its_order(segment):
    sigmas, start, stop, order = segment
    nodes = lagrange_supports(start, stop, order)
    weights = lagrange(sigmas, nodes, start, stop)
    for degree in range(len(nodes)):
        exact = (sigmas[stop] ** (degree + 1) - sigmas[start] ** (degree + 1)) / (degree + 1)
        assert weights @ sigmas[list(nodes)] ** degree == pytest.approx(exact, abs=1e-9 * np.abs(weights).sum())


@given(segments())
def test_weights_sum_to_the_interval(segment):
    sigmas, start, stop, order = segment
    nodes = lagrange_supports(start, stop, order)
    length = sigmas[stop] - sigmas[start]
    assert euler(sigmas, range(start, stop)).sum() == pytest.approx(length)
    assert uniform(sigmas, nodes, start, stop).sum() == pytest.approx(length)
    assert lagrange(sigmas, nodes, start, stop).sum() == pytest.approx(length, abs=1e-9)
    assert leap(sigmas, start, stop) == pytest.approx(length)


@given(segments())
def test_supports_start_at_the_segment_and_never_reach_its_end(segment):
    _, start, stop, order = segment
    nodes = lagrange_supports(start, stop, order)
    assert nodes[0] == start and nodes[-1] < stop and len(nodes) <= order and list(nodes) == sorted(set(nodes))


def test_lagrange_of_one_node_is_the_leap():
    sigmas = np.array([1.0, 0.7, 0.2, 0.0])
    assert lagrange(sigmas, (0,), 0, 2) == pytest.approx([leap(sigmas, 0, 2)])


def test_lagrange_weights_can_change_sign_and_uniform_ones_cannot():
    sigmas = np.array([1.0, 0.98, 0.96, 0.3, 0.0])
    nodes = (0, 1, 2)
    assert lagrange(sigmas, nodes, 0, 4).max() > 0 > lagrange(sigmas, nodes, 0, 4).min()
    assert uniform(sigmas, nodes, 0, 4).max() < 0


def test_rescaling_restores_the_full_length_at_strength_one():
    assert rescale_factor(total=1.0, active=0.25, strength=1.0) * 0.25 == pytest.approx(1.0)
    assert rescale_factor(1.0, 0.25, 0.0) == 1.0 == rescale_factor(1.0, 0.0, 1.0)
    assert rescale_factor(1.0, 0.25, 1.5) == 1 + 1.5 * 3  # beyond 1 it extrapolates


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([1.0, 0.5, 0.5, 0.0], "strictly decrease"),
        ([1.0, 1.2, 0.0], "strictly decrease"),
        ([1.0, float("nan"), 0.0], "finite"),
        ([1.0, 0.5], "end at the clean end"),
        ([0.0], "at least two"),
    ],
)
def test_bad_noise_levels_are_refused(sigmas, says):
    with pytest.raises(ValueError, match=says):
        check_sigmas(sigmas)


def test_an_order_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        quadrature.lagrange_supports(0, 5, 0)
