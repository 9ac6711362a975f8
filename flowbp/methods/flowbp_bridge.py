"""FlowBP-Bridge: a sparse sum of steps on both sides of a gated bridge."""

from dataclasses import dataclass

from flowbp.active_sets import PairSampler, UniformPair, bridge_allocation, check_count, late_biased, train_window
from flowbp.methods.flowbp_sparse import sparse_sum
from flowbp.plan import Bridge, SurrogatePlan
from flowbp.quadrature import Solver, check_sigmas, solver_table, weights_in


@dataclass(frozen=True)
class FlowBPBridge:
    """FlowBP-Sparse with one Jacobian factor (Wang et al. 2026, arXiv 2606.11075): the gradient at node j also flows
    into its input, through the gate alpha, and on to the active nodes before j.

    `pairs` draws j. The other num_active - 1 nodes are divided between the two sides in proportion to their lengths.
    """

    num_active: int = 5
    late_bias: float = 4.0
    rescale: float = 0.0
    alpha: float = 0.5
    pairs: PairSampler = UniformPair()
    tail_ratio: float = 1.0

    def plan(self, sigmas, rng, solver: Solver = "euler") -> SurrogatePlan:
        num_steps = len(check_sigmas(sigmas)) - 1
        start, stop = train_window(num_steps, self.tail_ratio, min_length=3)
        check_count(self.num_active, stop - start)
        _, j = self.pairs(num_steps, start, rng)
        num_pre, num_post = bridge_allocation(self.num_active, j - start, stop - j)
        pre = late_biased(range(start, j), num_pre, self.late_bias, rng)
        post = late_biased(range(j + 1, stop), num_post - 1, self.late_bias, rng) if num_post > 1 else ()
        return self.at(sigmas, j, (*pre, j, *post), solver)

    def at(self, sigmas, j: int, active, solver: Solver = "euler") -> SurrogatePlan:
        if j not in active:
            raise ValueError(f"bridge node {j} must be an active node; active nodes are {list(active)}")
        table = solver_table(check_sigmas(sigmas), solver)
        nodes, weights, gradients = sparse_sum(table, active, self.rescale, self.tail_ratio, min_window=3)
        at_j = zip(weights_in(table, j), weights, strict=True)
        shares = tuple(part / whole if whole else 1.0 for part, whole in at_j)
        return SurrogatePlan(nodes, weights, gradients, bridge=Bridge(j, self.alpha), shares=shares)
