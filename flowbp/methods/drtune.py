"""DRTune: a few equally spaced steps, network inputs detached, with an early stop."""

from dataclasses import dataclass

import numpy as np

from flowbp.active_sets import check_count, equally_spaced, is_active
from flowbp.plan import PosteriorMean, SurrogatePlan, check_range
from flowbp.quadrature import check_sigmas, euler, leap


@dataclass(frozen=True)
class DRTune:
    """Deep reward tuning (Wu et al. 2024, arXiv 2405.00760): K equally spaced nodes up to an early stop e.

    e is drawn among the last m nodes, and the reward sees its posterior mean. m is `early_stop_steps`, or where that is
    None round(N early_stop_ratio); with m = 0, e is always the last node. Gradient flows through the sum of Euler steps
    and not through the network's inputs.
    """

    num_active: int = 3
    early_stop_ratio: float = 0.4
    early_stop_steps: int | None = None

    def plan(self, sigmas, rng) -> SurrogatePlan:
        num_steps = len(check_sigmas(sigmas)) - 1
        check_count(self.num_active, num_steps)
        check_range("early_stop_ratio", self.early_stop_ratio, 0, 1, "0 never stops early")
        latest = round(num_steps * self.early_stop_ratio) if self.early_stop_steps is None else self.early_stop_steps
        check_range("early_stop_steps", latest, 0, num_steps, "0 never stops early, the rollout has no more steps")
        stop = num_steps - (int(rng.integers(1, latest + 1)) if latest else 1)
        return self.at(sigmas, stop, equally_spaced(stop + 1, self.num_active, rng))

    def at(self, sigmas, stop: int, active) -> SurrogatePlan:
        sigmas = check_sigmas(sigmas)
        nodes, chosen = tuple(range(stop + 1)), is_active(stop + 1, active)
        weights = euler(sigmas, nodes)
        weights[stop] = leap(sigmas, stop, -1)
        gradients = np.where(chosen, weights, 0.0)
        return SurrogatePlan(nodes, tuple(weights), tuple(gradients), reward_input=PosteriorMean(stop))
