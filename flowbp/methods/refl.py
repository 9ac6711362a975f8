"""ReFL: reward the one-step prediction from a late node."""

from dataclasses import dataclass

from flowbp.plan import PosteriorMean, SurrogatePlan, check_range
from flowbp.quadrature import check_sigmas, leap


@dataclass(frozen=True)
class ReFL:
    """Reward feedback learning (Xu et al. 2023, arXiv 2304.05977): the posterior mean of one node among the last
    `last_n`. The rollout stops at that node, and one VJP is taken there.
    """

    last_n: int = 11

    def plan(self, sigmas, rng) -> SurrogatePlan:
        num_steps = len(check_sigmas(sigmas)) - 1
        check_range("last_n", self.last_n, 1, num_steps, "take at most the steps of the rollout")
        return self.at(sigmas, num_steps - int(rng.integers(1, self.last_n + 1)))

    def at(self, sigmas, node: int) -> SurrogatePlan:
        sigmas = check_sigmas(sigmas)
        weight = leap(sigmas, node, -1)
        return SurrogatePlan((node,), (weight,), (weight,), start=node, reward_input=PosteriorMean(node))
