"""Several rewards at once: one loss, in which a running scale makes rewards of different units comparable.

loss = sum_k  weight_k / scale_k * mean(max(hinge_k - r_k, 0))        scale_k = 1, or the running deviation of r_k
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flowbp import log
from flowbp.objective import Objective
from flowbp.rewards.base import Relative, Reward, Smoothing

BOUND = 10.0  # deviations: no score of 10^23 of a normal distribution lies further out


class RunningScale:
    """The standard deviation of a reward over recent batches, from exponential averages of its first two moments.

    decay: a batch's share shrinks by this factor with every later batch. A batch with a score that is not finite is
        left out. A score further than BOUND deviations from the mean so far counts as if it lay there, so that one
        outlier among B scores widens the deviation by a factor of at most (1 + (1 - decay) BOUND^2 / B)^(1/2), while a
        reward that does change its scale is followed within tens of batches. In the first batch the median and the
        median absolute deviation take their place.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = decay
        self.moments = torch.zeros(3, dtype=torch.float64)  # sums over batches of share, share r and share r^2

    def update(self, scores: Tensor) -> None:
        """Add a batch of scores [R]."""
        r = scores.detach().double().cpu()
        if not r.isfinite().all():
            return
        weight, first, _ = self.moments.tolist()
        if weight > 0:
            middle, width = first / weight, self.value
        else:
            middle = r.median().item()
            width = 1.4826 * (r - middle).abs().median().item() or math.inf  # the deviation of a normal distribution
        r = r.clamp(middle - BOUND * width, middle + BOUND * width)
        batch = torch.stack([torch.ones_like(r[0]), r.mean(), r.square().mean()])
        self.moments = self.decay * self.moments + (1 - self.decay) * batch

    @property
    def value(self) -> float:
        """The deviation, at least a thousandth of the root mean square. It is 1 before the first batch."""
        weight, first, second = self.moments.tolist()
        if second == 0:
            return 1.0
        mean, square = first / weight, second / weight
        return max(square - mean * mean, 1e-6 * square) ** 0.5


def smoothed(reward: Reward, smoothing: Smoothing, images: Tensor, prompts: list[str], seeds: list[int]) -> Tensor:
    """The mean score [R] of `reward` under `smoothing`.

    seeds: one an image, so that an image's perturbations do not depend on the rest of its batch.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scores = [reward(perturbed(images, smoothing, generators), prompts) for _ in range(smoothing.copies)]
    return torch.stack(scores).mean(dim=0)


def perturbed(images: Tensor, smoothing: Smoothing, generators: list[torch.Generator]) -> Tensor:
    shift, (height, width) = smoothing.shift, images.shape[-2:]
    padded = torch.nn.functional.pad(images, [shift] * 4, mode="replicate")
    moved = []
    for image, generator in zip(padded, generators, strict=True):
        top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        moved.append(image[:, top : top + height, left : left + width] + smoothing.noise * noise)
    return torch.stack(moved)


@dataclass
class Term:
    """One reward of several. objective: holds its hinge, in the units of what `relative` makes of the reward. scale:
    None does not rescale it.
    """

    reward: Reward
    objective: Objective = field(default_factory=Objective)
    weight: float = 1.0
    smoothing: Smoothing | None = None
    scale: RunningScale | None = None
    relative: Relative | None = None


class WeightedRewards:
    """A weighted sum of reward losses, by name. Takes the place of one reward and its `Objective` in `reward_gradient`.

    A batch is scaled by the deviations of the batches before it, so that its gradient does not depend on the size of
    the parts in which it is scored. The first batch is not scaled.
    """

    def __init__(self, terms: dict[str, Term]):
        self.terms = terms
        self.squares = dict.fromkeys(terms, 0.0)  # of the loss's gradient in the images through each reward, this step

    def warn_of_mixtures(self) -> None:
        """Say where some of several rewards are rescaled and others are not."""
        scaled = [name for name, term in self.terms.items() if term.scale is not None]
        if 0 < len(scaled) < len(self.terms):
            why = "divided by its deviation, a loss may drown the others; set it for all, or watch the shares"
            log.warning("normalise is true of %s alone: %s", ", ".join(scaled), why)

    @property
    def rewards(self) -> dict[str, Reward]:
        """The rewards as an evaluation scores them: not relative, smoothed, weighted or rescaled."""
        return {name: term.reward for name, term in self.terms.items()}

    def score(self, images: Tensor, prompts: list[str], seeds: list[int]) -> Tensor:
        """Scores [R, K] of images [R, 3, H, W] in [0, 1] by the K rewards. seeds: one an image, for the smoothing."""
        columns = []
        for name, term in self.terms.items():
            reward, own = term.reward, images
            if len(self.terms) > 1 and images.requires_grad:
                own = images.view_as(images)
                own.register_hook(partial(self._watch, name))
            if term.relative is not None:
                reward = partial(term.relative, reward)
            if term.smoothing is None:
                column = reward(own, prompts)
            else:
                column = smoothed(reward, term.smoothing, own, prompts, seeds)
            columns.append(column.to(torch.promote_types(column.dtype, torch.float32)))
        return torch.stack(columns, dim=1)

    def loss(self, scores: Tensor, factors: Tensor | None = None) -> Tensor:
        """Scores [R, K] -> scalar. factors: [R], as in `Objective.loss`."""
        total = scores.new_zeros(())
        for term, column in zip(self.terms.values(), scores.unbind(dim=1), strict=True):
            scale = 1.0 if term.scale is None else term.scale.value
            total = total + term.weight / scale * term.objective.loss(column, factors)
        return total

    def update(self, scores: Tensor) -> dict[str, float]:
        """Show the running scales a whole batch of scores [R, K], of all processes together.

        Returns each reward's mean, and of several rewards NAME_share: the norm of the loss's gradient in this process's
        images through that reward, over the sum of these norms.
        """
        for term, column in zip(self.terms.values(), scores.unbind(dim=1), strict=True):
            if term.scale is not None:
                term.scale.update(column)
        norms = {name: float(square) ** 0.5 for name, square in self.squares.items()}
        self.squares, total = dict.fromkeys(self.terms, 0.0), sum(norms.values()) or 1.0
        shares = {f"{name}_share": norm / total for name, norm in norms.items()} if len(norms) > 1 else {}
        return dict(zip(self.terms, scores.mean(dim=0).tolist(), strict=True)) | shares

    def _watch(self, name: str, gradient: Tensor) -> None:
        self.squares[name] += gradient.float().square().sum()

    def state_dict(self) -> dict[str, Tensor]:
        """The running scales by name."""
        return {name: term.scale.moments for name, term in self.terms.items() if term.scale is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError unless it is of just the rewards that are rescaled here."""
        if state.keys() != self.state_dict().keys():
            held, normalised = sorted(state), sorted(self.state_dict())
            raise ValueError(f"the checkpoint holds running scales of {held}, this config normalises {normalised}")
        for name, moments in state.items():
            self.terms[name].scale.moments = moments
