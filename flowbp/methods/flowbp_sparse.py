"""FlowBP-Sparse: a late-biased random subset of the solver's own steps."""

from dataclasses import dataclass

import numpy as np

from flowbp.active_sets import is_active, late_biased, train_window
from flowbp.plan import SurrogatePlan
from flowbp.quadrature import Solver, check_sigmas, rescale_factor, solver_table, weights_in


@dataclass(frozen=True)
class FlowBPSparse:
    """The solver's own sum over all steps, of which `num_active` carry gradient (Wang et al. 2026, arXiv 2606.11075).

    Nodes are drawn without replacement from the last `tail_ratio` of the trajectory, with probability
    ~ (i + 1)^late_bias. `rescale` >= 0 makes up for the steps that are left out: every gradient is multiplied by
    1 + rescale (T / A - 1), with T and A the sums of absolute weights in the train window and of the active steps. 1
    restores the full length, more extrapolates beyond it. A weight is that of v_i in x_N: the step's length for Euler.
    """

    num_active: int = 4
    late_bias: float = 1.0
    rescale: float = 0.5
    tail_ratio: float = 1.0

    def plan(self, sigmas, rng, solver: Solver = "euler") -> SurrogatePlan:
        start, stop = train_window(len(check_sigmas(sigmas)) - 1, self.tail_ratio)
        active = late_biased(range(start, stop), self.num_active, self.late_bias, rng, first_weight=start + 1)
        return self.at(sigmas, active, solver)

    def at(self, sigmas, active, solver: Solver = "euler") -> SurrogatePlan:
        table = solver_table(check_sigmas(sigmas), solver)
        return SurrogatePlan(*sparse_sum(table, active, self.rescale, self.tail_ratio, min_window=1))


def sparse_sum(table: np.ndarray, active, rescale: float, tail_ratio: float, min_window: int):
    """All nodes of a rollout with `table`, their weights in x_N, and their gradient weights: rescaled on `active`, zero
    elsewhere.
    """
    nodes = tuple(range(len(table)))
    weights = weights_in(table, len(table))
    chosen = is_active(len(nodes), active)
    window = slice(*train_window(len(nodes), tail_ratio, min_window))
    rho = rescale_factor(np.abs(weights[window]).sum(), np.abs(weights[chosen]).sum(), rescale)
    return nodes, tuple(weights), tuple(np.where(chosen, rho * weights, 0.0))
