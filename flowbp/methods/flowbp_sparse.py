"""FlowBP-Sparse: a late-biased random subset of the solver's own steps."""

from dataclasses import dataclass

import numpy as np

from flowbp.active_sets import is_active, late_biased, train_window
from flowbp.plan import SurrogatePlan
from flowbp.quadrature import check_sigmas, euler, rescale_factor


@dataclass(frozen=True)
class FlowBPSparse:
    """The Euler sum over all steps, of which `num_active` carry gradient (Wang et al. 2026, arXiv 2606.11075).

    Nodes are drawn without replacement from the last `tail_ratio` of the trajectory, with probability
    ~ (i + 1)^late_bias. `rescale` >= 0 makes up for the steps that are left out: every gradient is multiplied by
    1 + rescale (T / A - 1), with T and A the length of the train window and of the active steps. 1 restores the full
    length, more extrapolates beyond it.
    """

    num_active: int = 4
    late_bias: float = 1.0
    rescale: float = 0.5
    tail_ratio: float = 1.0

    def plan(self, sigmas, rng) -> SurrogatePlan:
        start, stop = train_window(len(check_sigmas(sigmas)) - 1, self.tail_ratio)
        active = late_biased(range(start, stop), self.num_active, self.late_bias, rng, first_weight=start + 1)
        return self.at(sigmas, active)

    def at(self, sigmas, active) -> SurrogatePlan:
        nodes, weights, grad_weights = sparse_euler(sigmas, active, self.rescale, self.tail_ratio, min_window=1)
        return SurrogatePlan(nodes, weights, grad_weights)


def sparse_euler(sigmas, active, rescale: float, tail_ratio: float, min_window: int):
    """All nodes of a rollout, their Euler weights, and their gradient weights: rescaled on `active`, zero elsewhere."""
    sigmas = check_sigmas(sigmas)
    nodes = tuple(range(len(sigmas) - 1))
    weights = euler(sigmas, nodes)
    chosen = is_active(len(nodes), active)
    window = slice(*train_window(len(nodes), tail_ratio, min_window))
    rho = rescale_factor(np.abs(weights[window]).sum(), np.abs(weights[chosen]).sum(), rescale)
    return nodes, tuple(weights), tuple(np.where(chosen, rho * weights, 0.0))
