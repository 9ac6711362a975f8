"""The methods. Each is a small frozen dataclass: its fields are the hyperparameters, its `plan` draws a SurrogatePlan.

| name            | reward-model input       | active set                    | weights            | bridge      |
|-----------------|--------------------------|-------------------------------|--------------------|-------------|
| refl            | posterior mean, node i   | i, among the last n           | leap               |             |
| draft-lv        | posterior mean, last     | last node + re-noised copies  | leap               |             |
| drtune          | posterior mean, node e   | K equally spaced up to e      | Euler              |             |
| leapalign       | sampled image            | k, j                          | two leaps          | j, alpha    |
| flowbp-sparse   | sampled image            | K late-biased                 | solver's, rescaled |             |
| flowbp-bridge   | sampled image            | K late-biased on both sides   | solver's, rescaled | j, alpha    |
| flowbp-lagrange | sampled image            | first supports of each leap   | Lagrange, rescaled | j, alpha    |

`plan(sigmas, rng)` draws the indices. `at(sigmas, ...)` takes them as arguments, so that any published case can be
rebuilt exactly.
"""

import inspect
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
from flowbp.plan import Plan, PlanBatch, SurrogatePlan
from flowbp.quadrature import Solver

Plans = Literal["shared", "per_batch", "per_sample", "stratified"]


class Method(Protocol):
    """Anything that draws a plan. A config names your own as "module:Class", a frozen dataclass.

    A method that sums the rollout's own steps takes `solver` too, as FlowBP-Sparse does: plan(sigmas, rng, solver). The
    other methods leap over the steps and need not know how they were made.
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


def draw_plan(method: Method, sigmas: np.ndarray, rng: np.random.Generator, solver: Solver = "euler") -> SurrogatePlan:
    """One plan of `method` for a rollout with `solver` on the noise levels `sigmas` [N + 1]."""
    takes_solver = "solver" in inspect.signature(method.plan).parameters
    return method.plan(sigmas, rng, **({"solver": solver} if takes_solver else {}))


def draw_plans(
    method: Method, sigmas: np.ndarray, rng: np.random.Generator, batch: int, plans: Plans, solver: Solver = "euler"
) -> Plan:
    """The plan of a batch, or one plan a sample, for a rollout with `solver`.

    shared, per_batch  one plan for all samples. The two differ in the trainer alone: for "shared" it gives all
                       micro-batches of a step the same generator, for "per_batch" each its own
    per_sample         one plan a sample, drawn independently
    stratified         one plan a sample, spread evenly over the trajectory. A plan's position is the mean of its active
                       nodes, weighted by their absolute gradient weights

    The expected gradient is the same whichever is chosen; its variance is not.
    """

    def draw(rng: np.random.Generator) -> SurrogatePlan:
        return draw_plan(method, sigmas, rng, solver)

    if plans in ("shared", "per_batch"):
        return draw(rng)
    if plans == "per_sample":
        return PlanBatch(tuple(draw(rng) for _ in range(batch)))

    def position(plan: SurrogatePlan) -> float:
        nodes, weights = np.array(plan.active).T
        return float(np.average(nodes, weights=np.abs(weights)))

    return PlanBatch(tuple(stratified_draws(draw, batch, position, rng)))
