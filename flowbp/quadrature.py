"""Quadrature rules for integrating a velocity over an interval of noise levels.

A rule on nodes i_1 < ... < i_K of the steps [start, stop) returns weights w with
    sum_k w_k v(sigma_{i_k})  ~  integral of v from sigma_start to sigma_stop.
Weights are in sigma units and signed (sigma decreases towards the clean end, so a positive rule has negative weights),
and always sum to sigma_stop - sigma_start. Everything is computed in float64.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from flowbp.given import short

Solver = Literal["euler", "adams-2", "adams-3"]
ORDERS: dict[Solver, int] = {"euler": 1, "adams-2": 2, "adams-3": 3}
# Of a solver's absolute weights in one step, in step lengths. Adams-Bashforth of order 3 has 3.67 on even steps.
LARGEST_SUM = 5.0


def check_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    """The noise levels [N + 1] as float64; ValueError unless they are finite, strictly decreasing, and end at 0."""
    try:
        levels = np.asarray(sigmas, dtype=np.float64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"sigmas must be noise levels, not {short(sigmas)}: {error}") from error
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"sigmas must be a vector of at least two noise levels, got shape {levels.shape}")
    if not np.all(np.isfinite(levels)):
        raise ValueError(f"sigmas must be finite, got {levels.tolist()}")
    if len(rising := np.flatnonzero(np.diff(levels) >= 0)):
        i = int(rising[0])
        raise ValueError(f"sigmas must strictly decrease, but sigmas[{i}:{i + 2}] are {levels[i : i + 2].tolist()}")
    if levels[-1] != 0.0:
        raise ValueError(f"sigmas must end at the clean end, 0, got {levels[-1]:.6g}: append a final 0")
    return levels


def euler(sigmas: np.ndarray, nodes: Sequence[int]) -> np.ndarray:
    """The solver's own step at each node, h_i = sigma_{i+1} - sigma_i. Exact for the Euler rollout when the nodes are
    all its steps.
    """
    at = np.asarray(nodes, dtype=int)
    return sigmas[at + 1] - sigmas[at]


def leap(sigmas: np.ndarray, start: int, stop: int) -> float:
    """The one-node rule at `start`: the whole signed length sigma_stop - sigma_start on one velocity."""
    return float(sigmas[stop] - sigmas[start])


def uniform(sigmas: np.ndarray, nodes: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Equal weights. First order only, but every weight keeps the sign of the interval."""
    return np.full(len(nodes), leap(sigmas, start, stop) / len(nodes))


def lagrange(sigmas: np.ndarray, nodes: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Interpolatory quadrature: w_m = integral from sigma_start to sigma_stop of the m-th Lagrange basis polynomial on
    the nodes' sigmas.

    Exact for velocities polynomial in sigma of degree < K. On uneven nodes a weight may have the sign opposite to the
    interval's; its node's gradient then points away from that of the full chain. `uniform` has no such weights. Source:
    FlowBP-Lagrange, arXiv 2606.11075.
    """
    x = sigmas[np.asarray(nodes, dtype=int)]
    middle, half = (sigmas[stop] + sigmas[start]) / 2, (sigmas[stop] - sigmas[start]) / 2
    points, point_weights = np.polynomial.legendre.leggauss(len(x) // 2 + 1)  # exact for the basis, of degree K - 1
    t = middle + half * points
    weights = []
    for m in range(len(x)):
        others = np.delete(x, m)
        basis = np.prod((t[:, None] - others) / (x[m] - others), axis=1)
        weights.append(half * point_weights @ basis)
    return np.array(weights)


def solver_table(sigmas: np.ndarray, solver: Solver) -> np.ndarray:
    """B [N, N] of a linear multistep rollout x_{n+1} = x_n + sum_i B[n, i] v_i, in sigma units.

    adams-q is Adams-Bashforth of order q: row n is the Lagrange rule of the nodes n-q+1 ... n over the step [n, n + 1).
    A row takes the highest order up to q with sum_i |B[n, i]| <= 5 |h_n|, because the rule of nodes that lie close
    together amplifies velocities. The first steps have fewer nodes, so that adams-3 too converges with order 2. "euler"
    is diag(h).

    So x_j = x_0 + sum_i W_i v_i with W_i = sum_{n<j} B[n, i]: a column's sum down to row j is the weight of a velocity
    in x_j (`weights_in`). Raises ValueError for an unknown solver.
    """
    if solver not in ORDERS:
        raise ValueError(f"solver must be one of {', '.join(ORDERS)}, not {solver!r}")
    table = np.diag(euler(sigmas, range(len(sigmas) - 1)))
    for n in range(len(table)):
        for order in range(min(ORDERS[solver], n + 1), 1, -1):
            nodes = range(n - order + 1, n + 1)
            row = lagrange(sigmas, nodes, n, n + 1)
            if np.abs(row).sum() <= LARGEST_SUM * abs(leap(sigmas, n, n + 1)):
                table[n, nodes] = row
                break
    return table


def weights_in(table: np.ndarray, stop: int) -> np.ndarray:
    """[N] weights W with x_stop = x_0 + sum_i W_i v_i, of the rollout with `solver_table`. Euler: h_i, and 0 from
    `stop` on.
    """
    return table[:stop].sum(axis=0)


def lagrange_supports(start: int, stop: int, order: int) -> tuple[int, ...]:
    """At most `order` nodes spread evenly over the steps [start, stop), the first and the last step included.

    start + round(m (L - 1) / (order - 1)) for m = 0 ... order - 1, rounding half to even, with L = stop - start; all
    steps when L <= order.
    """
    if order < 1:
        raise ValueError(f"quadrature order must be at least 1, got {order}")
    length = stop - start
    order = min(order, length)
    if order == 1:
        return (start,)
    return tuple(sorted({start + round(m * (length - 1) / (order - 1)) for m in range(order)}))


def rescale_factor(total: float, active: float, strength: float) -> float:
    """rho = 1 + strength (total / active - 1), which makes up for the share of the interval that the active nodes do
    not cover. It multiplies gradients, never a value.

    total and active are sums of absolute weights. strength 0 leaves the gradient as it is, 1 restores the full length,
    more than 1 extrapolates beyond it.
    """
    if not 0.0 <= strength < math.inf:  # also refuses NaN
        meaning = "0 leaves the gradient as it is, 1 restores the full length, more extrapolates beyond it"
        raise ValueError(f"rescale must be a finite number of 0 or more, got {strength}: {meaning}")
    return 1.0 + strength * (total / active - 1.0) if strength > 0 and active > 1e-8 else 1.0
