"""What the trainer asks of a reward, and what a config may say of smoothing it. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """Scores images against their prompts."""

    def __call__(self, images: "Tensor", prompts: list[str]) -> "Tensor":
        """images [B, 3, H, W] in [0, 1] -> [B] float32, higher is better, differentiable in `images`."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A reward that can also say how much images resemble each other."""

    def embed(self, images: "Tensor") -> "Tensor":
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
