"""LeapAlign: two one-node leaps joined by a gated bridge."""

from dataclasses import dataclass

from flowbp.active_sets import PairSampler, UniformPair, train_window
from flowbp.plan import Bridge, Similarity, SurrogatePlan
from flowbp.quadrature import check_sigmas, leap


@dataclass(frozen=True)
class LeapAlign:
    """Two leaps x_k -> x_j -> x_N, joined at x_j by a gated bridge (Liang et al. 2026, arXiv 2604.15311).

    FlowBP-Lagrange of order 1 is this method. Samples that the leaps predict well weigh more; `tau` bounds how much.
    alpha = 0 cuts the cross-step path, alpha = 1 keeps it whole.
    """

    alpha: float = 0.3
    tau: float = 0.1
    pairs: PairSampler = UniformPair()
    tail_ratio: float = 1.0

    def plan(self, sigmas, rng) -> SurrogatePlan:
        num_steps = len(check_sigmas(sigmas)) - 1
        start, _ = train_window(num_steps, self.tail_ratio, min_length=3)
        return self.at(sigmas, *self.pairs(num_steps, start, rng))

    def at(self, sigmas, k: int, j: int) -> SurrogatePlan:
        sigmas = check_sigmas(sigmas)
        leaps, bridge = (leap(sigmas, k, j), leap(sigmas, j, -1)), Bridge(j, self.alpha)
        return SurrogatePlan((k, j), leaps, leaps, start=k, bridge=bridge, similarity=Similarity(self.tau))
