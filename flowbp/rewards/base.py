"""What the trainer asks of a reward, and a wrapper that smooths its gradient."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Reward", "Smoothed"]


class Reward(Protocol):
    """Scores images against their prompts."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32, higher is better, differentiable in `images`."""
        ...


class Smoothed:
    """The mean score over `copies` of each image, shifted by up to `shift` pixels (edges replicated) and with Gaussian noise added.

    An average over small changes that do not alter what an image shows: its gradient points where the whole neighbourhood improves, and
    adversarial pixel patterns, which such changes destroy, earn little. noise: standard deviation, in units of the [0, 1] range.
    generators: one an image, so that an image's perturbations do not depend on the batch that it comes in.
    """

    def __init__(self, reward: Reward, copies: int, shift: int, noise: float, generators: list[torch.Generator]):
        self.reward, self.copies, self.shift, self.noise, self.generators = reward, copies, shift, noise, generators

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([self.reward(self._perturb(images), prompts) for _ in range(self.copies)]).mean(dim=0)

    def _perturb(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, [self.shift] * 4, mode="replicate")
        moved = []
        for image, generator in zip(padded, self.generators, strict=True):
            top, left = torch.randint(0, 2 * self.shift + 1, (2,), generator=generator).tolist()
            noise = torch.randn(images.shape[1:], generator=generator).to(images)
            moved.append(image[:, top : top + height, left : left + width] + self.noise * noise)
        return torch.stack(moved)
