"""DRaFT-LV: the last step, with re-noised copies that lower the variance."""

from dataclasses import dataclass

from flowbp.plan import PosteriorMean, SurrogatePlan
from flowbp.quadrature import check_sigmas, leap


@dataclass(frozen=True)
class DRaFTLV:
    """Direct reward fine-tuning, low variance (Clark et al. 2023, arXiv 2309.17400): backpropagate the last step only.

    `num_renoised` copies of the sample are re-noised to the last noise level and denoised again. The reward is averaged
    over the sample and its copies. Without copies the method is DRaFT-1.
    """

    num_renoised: int = 2

    def plan(self, sigmas, rng) -> SurrogatePlan:
        return self.at(sigmas)

    def at(self, sigmas) -> SurrogatePlan:
        sigmas = check_sigmas(sigmas)
        last = len(sigmas) - 2
        h, seen = leap(sigmas, last, -1), PosteriorMean(last)
        return SurrogatePlan((last,), (h,), (h,), start=last, reward_input=seen, num_renoised=self.num_renoised)
