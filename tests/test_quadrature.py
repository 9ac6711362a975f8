"""Quadrature rules: exactness, sums, signs, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp import quadrature
from flowbp.quadrature import (
    ORDERS,
    check_sigmas,
    euler,
    lagrange,
    lagrange_supports,
    leap,
    rescale_factor,
    solver_table,
    uniform,
    weights_in,
)


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


def polynomial_step(nodes, start, stop):
    """A step's weights from its moments: sum_i w_i s_i^d = integral of s^d for every degree d below the order."""
    degrees = np.arange(len(nodes))[:, None]
    moments = (stop ** (degrees + 1) - start ** (degrees + 1)) / (degrees + 1)
    return np.linalg.solve(np.asarray(nodes)[None] ** degrees, moments)[:, 0]


@given(segments(), st.sampled_from(["adams-2", "adams-3"]))
def test_a_multistep_row_is_exact_for_polynomials_of_its_order_and_amplifies_no_velocity_much(segment, solver):
    sigmas, _, _, _ = segment
    table = solver_table(sigmas, solver)
    assert not np.triu(table, 1).any() and not np.tril(table, -ORDERS[solver]).any()
    for n, row in enumerate(table):
        h, (nodes,) = leap(sigmas, n, n + 1), row.nonzero()
        lower = polynomial_step(sigmas[nodes], sigmas[n], sigmas[n + 1])
        assert row[nodes] == pytest.approx(lower, rel=1e-6, abs=1e-9 * abs(h))
        assert np.abs(row).sum() <= 5 * abs(h) * (1 + 1e-12)
        if len(nodes) < min(ORDERS[solver], n + 1):  # a higher order would have amplified
            higher = polynomial_step(sigmas[nodes[0] - 1 : n + 1], sigmas[n], sigmas[n + 1])
            assert np.abs(higher).sum() > 5 * abs(h) * (1 - 1e-6)


@given(segments())
def test_the_table_of_euler_is_its_steps_to_the_bit(segment):
    sigmas, start, _, _ = segment
    steps, table = np.diff(sigmas), solver_table(sigmas, "euler")
    assert (table == np.diag(steps)).all()
    assert (weights_in(table, len(steps)) == steps).all()
    assert (weights_in(table, start) == np.where(np.arange(len(steps)) < start, steps, 0)).all()


def test_even_steps_have_the_weights_of_the_books():
    sigmas = np.linspace(1, 0, 9)
    assert solver_table(sigmas, "adams-2")[5] * -8 == pytest.approx([0, 0, 0, 0, -1 / 2, 3 / 2, 0, 0])
    assert solver_table(sigmas, "adams-3")[5] * -8 == pytest.approx([0, 0, 0, 5 / 12, -16 / 12, 23 / 12, 0, 0])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams-2", 2), ("adams-3", 2)])
def test_a_solver_has_its_order_of_convergence(solver, order):
    """On dx/ds = -x cos(4 s) + s from x(1) = 1, over uneven levels: half the step, 2^-order of the error. The
    first step is Euler's, whose error of order 2 stays in x.
    """
    exact = 0.29213575895329  # by Runge-Kutta of order 4, 200,000 steps

    def end(num_steps):
        u = 1 - np.arange(num_steps + 1) / num_steps
        sigmas, velocities, x = 2 * u / (1 + u), [], 1.0
        for n, row in enumerate(solver_table(sigmas, solver)):
            velocities.append(-x * np.cos(4 * sigmas[n]) + sigmas[n])
            x += row[: n + 1] @ velocities
        return x

    errors = [abs(end(num_steps) - exact) for num_steps in (64, 128, 256)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="euler, adams-2, adams-3, not 'heun'"):
        solver_table(np.array([1.0, 0.0]), "heun")


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
