"""What the trainer asks of a reward, and a wrapper that smooths its gradient."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Reward(Protocol):
    """Scores images against their prompts."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32, higher is better, differentiable in `images`."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A reward that can also say how much images resemble each other."""

    def embed(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> unit vectors [B, d] float32; their cosine is the likeness of two images."""


@dataclass(frozen=True)
class Smoothing:
    """Averages a score over `copies` of each image, shifted by up to `shift` pixels (edges replicated) and with
    Gaussian noise of standard deviation `noise` added, in units of the [0, 1] range.

    Such changes do not alter what an image shows. The mean gradient points where the whole neighbourhood improves.
    Adversarial pixel patterns earn little, because shift and noise destroy them.
    """

    copies: int = 2
    shift: int = 1
    noise: float = 0.02

    def __post_init__(self):
        if not (1 <= self.copies <= 1000 and 0 <= self.shift <= 1000 and self.noise >= 0):
            raise ValueError(f"smoothing needs 1 to 1000 copies, a shift of 0 to 1000 and noise >= 0, got {self}")


class Smoothed:
    """The mean score of `reward` under `smoothing`.

    generators: one an image, so that an image's perturbations do not depend on the rest of its batch.
    """

    def __init__(self, reward: Reward, smoothing: Smoothing, generators: list[torch.Generator]):
        self.reward, self.smoothing, self.generators = reward, smoothing, generators

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = [self.reward(self._perturb(images), prompts) for _ in range(self.smoothing.copies)]
        return torch.stack(scores).mean(dim=0)

    def _perturb(self, images: Tensor) -> Tensor:
        shift, (height, width) = self.smoothing.shift, images.shape[-2:]
        padded = torch.nn.functional.pad(images, [shift] * 4, mode="replicate")
        moved = []
        for image, generator in zip(padded, self.generators, strict=True):
            top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
            noise = torch.randn(images.shape[1:], generator=generator).to(images)
            moved.append(image[:, top : top + height, left : left + width] + self.smoothing.noise * noise)
        return torch.stack(moved)
