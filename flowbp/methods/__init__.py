"""The methods: each a small frozen dataclass whose fields are its hyperparameters and whose `plan` draws a
SurrogatePlan.

| name            | reward-model input       | active set                    | weights            | bridge      |
|-----------------|--------------------------|-------------------------------|--------------------|-------------|
| refl            | posterior mean, node i   | i, among the last n           | leap               |             |
| draft-lv        | posterior mean, last     | last node + re-noised copies  | leap               |             |
| drtune          | posterior mean, node e   | K equally spaced up to e      | Euler              |             |
| leapalign       | sampled image            | k, j                          | two leaps          | j, alpha    |
| flowbp-sparse   | sampled image            | K late-biased                 | Euler, rescaled    |             |
| flowbp-bridge   | sampled image            | K late-biased on both sides   | Euler, rescaled    | j, alpha    |
| flowbp-lagrange | sampled image            | first supports of each leap   | Lagrange, rescaled | j, alpha    |

Besides `plan(sigmas, rng)`, which draws the indices, every method has `at(sigmas, ...)`, which takes them: any
published case can be rebuilt exactly.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from flowbp.active_sets import stratified_draws
from flowbp.methods.draft_lv import DRaFTLV
from flowbp.methods.drtune import DRTune
from flowbp.methods.flowbp_bridge import FlowBPBridge
from flowbp.methods.flowbp_lagrange import FlowBPLagrange
from flowbp.methods.flowbp_sparse import FlowBPSparse
from flowbp.methods.leapalign import LeapAlign
from flowbp.methods.refl import ReFL
from flowbp.plan import PlanBatch, SurrogatePlan

__all__ = [
    "METHODS",
    "DRTune",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "LeapAlign",
    "Method",
    "ReFL",
    "draw_plans",
]


class Method(Protocol):
    """Anything that draws a plan. Write your own as a frozen dataclass and add it to METHODS to use it from a
    config.
    """

    def plan(self, sigmas: np.ndarray, rng: np.random.Generator) -> SurrogatePlan:
        """A plan for the noise levels `sigmas` [N + 1], strictly decreasing to 0. Raises ValueError when N is too small
        for the method.
        """
        ...


METHODS: dict[str, type] = {
    "refl": ReFL,
    "draft-lv": DRaFTLV,
    "drtune": DRTune,
    "leapalign": LeapAlign,
    "flowbp-sparse": FlowBPSparse,
    "flowbp-bridge": FlowBPBridge,
    "flowbp-lagrange": FlowBPLagrange,
}


def draw_plans(
    method: Method,
    sigmas: np.ndarray,
    rng: np.random.Generator,
    batch: int,
    plans: Literal["shared", "per_batch", "per_sample", "stratified"],
) -> SurrogatePlan | PlanBatch:
    """The plan of a batch: one for all its samples, one drawn for each, or one for each that together cover the
    trajectory.

    "shared" and "per_batch" both give one: a trainer draws the first with the same generator for every micro-batch of a
    step. The expected gradient is the same whichever is chosen; its variance is not. Stratified plans are spread by the
    mean position of their active nodes, weighted by their share of the gradient.
    """
    if plans in ("shared", "per_batch"):
        return method.plan(sigmas, rng)
    if plans == "per_sample":
        return PlanBatch(tuple(method.plan(sigmas, rng) for _ in range(batch)))

    def position(plan: SurrogatePlan) -> float:
        nodes, weights = np.array(plan.active).T
        return float(np.average(nodes, weights=np.abs(weights)))

    return PlanBatch(tuple(stratified_draws(lambda rng: method.plan(sigmas, rng), batch, position, rng)))
