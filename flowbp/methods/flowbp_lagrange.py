"""FlowBP-Lagrange: two higher-order leaps joined by a gated bridge."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowbp.active_sets import DirichletPair, PairSampler, train_window
from flowbp.plan import Bridge, Similarity, SurrogatePlan, check_range
from flowbp.quadrature import check_sigmas, lagrange, lagrange_supports, leap, rescale_factor, uniform

RULES = {"lagrange": lagrange, "uniform": uniform}


@dataclass(frozen=True)
class FlowBPLagrange:
    """Interpolatory quadrature over [k, j) and [j, N), of which the first supports carry gradient (Wang et al. 2026,
    arXiv 2606.11075).

    order          supports of each leap; 1 is LeapAlign
    active         which supports carry gradient: none, start, midpoint (the first two) or all
    max_active     at most so many of them in each leap; 0: no cap
    support_scale  factor on the gradient of active supports other than the leap's start
    weights        lagrange (exact to its order; a weight may have the wrong sign) or uniform (no weight does)
    anchor         share lambda of the quadrature in the first leap; the rest, 1 - lambda, is a plain leap from x_k
    rescale        as in FlowBP-Sparse, for each leap
    tau, max_dj, max_d0   similarity weights and filter, see `flowbp.plan.Similarity`
    """

    order: int = 3
    alpha: float = 0.1
    tau: float = 0.2
    rescale: float = 0.0
    active: Literal["none", "start", "midpoint", "all"] = "midpoint"
    max_active: int = 2
    support_scale: float = 0.25
    weights: Literal["lagrange", "uniform"] = "lagrange"
    anchor: float = 1.0
    pairs: PairSampler = DirichletPair()
    tail_ratio: float = 1.0
    max_dj: float | None = None
    max_d0: float | None = None

    def plan(self, sigmas, rng) -> SurrogatePlan:
        num_steps = len(check_sigmas(sigmas)) - 1
        start, _ = train_window(num_steps, self.tail_ratio, min_length=3)
        return self.at(sigmas, *self.pairs(num_steps, start, rng))

    def at(self, sigmas, k: int, j: int) -> SurrogatePlan:
        sigmas = check_sigmas(sigmas)
        check_range("anchor", self.anchor, 0, 1, "1 is the quadrature alone, 0 the plain leap from x_k")
        first_nodes, first, first_grad = self._segment(sigmas, k, j)
        second_nodes, second, second_grad = self._segment(sigmas, j, len(sigmas) - 1)
        plain_leap = np.where(np.array(first_nodes) == k, leap(sigmas, k, j), 0.0)
        first = self.anchor * first + (1.0 - self.anchor) * plain_leap
        first_grad = self.anchor * first_grad + (1.0 - self.anchor) * plain_leap
        nodes, weights, grad_weights = first_nodes + second_nodes, (*first, *second), (*first_grad, *second_grad)
        bridge, similarity = Bridge(j, self.alpha), Similarity(self.tau, self.max_dj, self.max_d0)
        return SurrogatePlan(nodes, weights, grad_weights, start=k, bridge=bridge, similarity=similarity)

    def _segment(self, sigmas, start: int, stop: int):
        """Supports, value weights and gradient weights of one leap."""
        nodes = lagrange_supports(start, stop, self.order)
        weights = RULES[self.weights](sigmas, nodes, start, stop)
        num_active = {"none": 0, "start": 1, "midpoint": 2, "all": len(nodes)}[self.active]
        num_active = min(num_active, self.max_active or len(nodes), len(nodes))
        is_active = np.arange(len(nodes)) < num_active
        rho = rescale_factor(np.abs(weights).sum(), np.abs(weights[is_active]).sum(), self.rescale)
        scale = np.where(np.arange(len(nodes)) == 0, 1.0, self.support_scale)
        return nodes, weights, np.where(is_active, scale * rho * weights, 0.0)
