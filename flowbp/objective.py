"""From rewards to a loss and its gradient: the hinge, the weights and the filter by trajectory similarity, and a batch
that is scored in parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp.plan import Similarity


def sample_weights(similarity: Similarity, d_j: Tensor, d_0: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [B], keep [B] bool) from the residuals [B]. Weight: 1 / (max(d_j, tau) + max(d_0, tau)). Keep: where
    each residual is at most its maximum.
    """
    weights = 1.0 / (d_j.clamp(min=similarity.tau) + d_0.clamp(min=similarity.tau))
    keep = torch.ones_like(d_j, dtype=torch.bool)
    for d, largest in ((d_j, similarity.max_dj), (d_0, similarity.max_d0)):
        if largest is not None:
            keep &= d <= largest
    return weights, keep


def loss_factors(weights: Tensor, keep: Tensor, copies: int = 1, kept: float | None = None) -> Tensor:
    """[R] factor of each of the R = copies * B losses in the mean over the kept samples: weight / (copies * kept), and
    0 for a dropped sample.

    weights, keep (bool): [B]. The losses are those of the batch, then of the batch's re-noised copies.
    kept: number of kept samples, keep.sum() by default. Where ranks average their gradients, pass the mean over ranks.
    """
    kept = keep.sum().item() if kept is None else kept
    return torch.where(keep, weights / (copies * kept), 0.0).repeat(copies)


@dataclass(frozen=True)
class Objective:
    """Mean over the kept samples of  weight * max(hinge - reward, 0),  or of  -weight * reward  when hinge is None.

    The hinge is a target: a sample whose reward has reached it gets no gradient.
    """

    hinge: float | None = None

    def loss(self, rewards: Tensor, factors: Tensor | None = None) -> Tensor:
        """rewards [R] -> scalar: the sum of factor times loss, or without factors the plain mean. A factor of 0 drops
        the sample, even if its reward is NaN.
        """
        losses = -rewards if self.hinge is None else torch.relu(self.hinge - rewards)
        return losses.mean() if factors is None else torch.where(factors != 0, factors * losses, 0.0).sum()


def reward_gradient(
    objective: Objective, score: Callable[[Tensor, slice], Tensor], z: Tensor, factors: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [R], loss [], g = dloss/dz [R, *S]), taken `rows` samples at a time: the graph of one part is freed
    before the next is made.

    score(z_part, slice of the R samples) -> their rewards, differentiable in z_part: the VAE's decoder and the reward
    model. rows: None takes all at once. g is the same for any `rows`, because the loss is a sum over samples and
    `factors` are constants.
    """
    rows = len(z) if rows is None else rows
    rewards, g, loss = [], torch.empty_like(z), 0.0
    for first in range(0, len(z), rows):
        part = slice(first, first + rows)
        leaf = z[part].detach().requires_grad_()
        scores = score(leaf, part)
        part_loss = objective.loss(scores, factors[part])
        (g[part],) = torch.autograd.grad(part_loss, leaf)
        rewards.append(scores.detach())
        loss = loss + part_loss.detach()
        del scores, part_loss
    return torch.cat(rewards), loss, g  # pyright: ignore[reportReturnType]


def clip_samples(g: Tensor, largest: float | None) -> Tensor:
    """Scale each sample's gradient [R, *S] so that R times its norm is at most `largest` (the loss is a mean over R
    samples).
    """
    if largest is None:
        return g
    norms = g.flatten(1).norm(dim=1) * len(g)
    return g * (largest / norms.clamp(min=largest)).view(-1, *[1] * (g.dim() - 1))
