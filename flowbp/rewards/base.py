"""What the trainer asks of a reward, and what a config may make of one. Imports no torch."""

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


@dataclass(frozen=True)
class Relative:
    """What an image gains by one wording of its prompt over another: (1 + scale) r(x, p+) - r(x, p-), in the reward's
    units (Shen et al. 2025, SRPO, arXiv 2509.06942).

    p+ and p- are the templates `positive` and `negative` with the prompt in the place of {prompt}, as "Realistic photo.
    {prompt}" and "CG render. {prompt}". With scale 0, what the reward likes under both wordings cancels, such as
    colours that it likes under any. The reward is called twice.
    """

    positive: str
    negative: str
    scale: float = 0.0

    def __post_init__(self):
        if "{prompt}" not in self.positive or self.positive == self.negative:
            raise ValueError(f"relative needs {{prompt}} in positive, and another text as negative, got {self}")
        if not 0 <= self.scale <= 1000:
            raise ValueError(f"relative needs a scale from 0 to 1000, got {self.scale}: 0 is the plain difference")

    def __call__(self, reward: Reward, images: "Tensor", prompts: list[str]) -> "Tensor":
        def scored(template: str) -> "Tensor":
            return reward(images, [template.replace("{prompt}", prompt) for prompt in prompts])

        return (1 + self.scale) * scored(self.positive) - scored(self.negative)
