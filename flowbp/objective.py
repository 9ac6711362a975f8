"""From rewards to a scalar loss: hinge, trajectory-similarity weights, and the filter on residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp.plan import Similarity

__all__ = ["Objective", "sample_weights"]


def sample_weights(similarity: Similarity, d_j: Tensor, d_0: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [B], keep [B] bool) from the residuals [B]: weight 1 / (max(d_j, tau) + max(d_0, tau)); keep where d <= its maximum."""
    weights = 1.0 / (d_j.clamp(min=similarity.tau) + d_0.clamp(min=similarity.tau))
    keep = torch.ones_like(d_j, dtype=torch.bool)
    for d, largest in ((d_j, similarity.max_dj), (d_0, similarity.max_d0)):
        if largest is not None:
            keep &= d <= largest
    return weights, keep


@dataclass(frozen=True)
class Objective:
    """Mean over the kept samples of  weight * max(hinge - reward, 0),  or of  -weight * reward  when hinge is None.

    A sample whose reward reached the hinge has no gradient: the target is met.
    """

    hinge: float | None = None

    def loss(self, rewards: Tensor, weights: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """rewards [R] -> scalar. weights and keep are [B], R a multiple of B (re-noised copies follow the batch). 0 if none is kept."""
        losses = -rewards if self.hinge is None else torch.relu(self.hinge - rewards)
        copies = 1 if weights is None else len(rewards) // len(weights)
        if weights is not None:
            losses = losses * weights.repeat(copies)
        if keep is not None:
            keep = keep.repeat(copies)
            return torch.where(keep, losses, 0.0).sum() / keep.sum().clamp(min=1)
        return losses.mean()
