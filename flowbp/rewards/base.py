"""What the trainer asks of a reward, and what a config may make of one. And a reward of your own: any Python
function of images and prompts, which a config names as "module:function". Imports no torch.
"""

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flowbp.given import find

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


# -- a reward of your own ----------------------------------------------------------------------------------------------


def find_callable(name: str) -> Any:
    """The function or the class "module:attribute". Raises ValueError for what cannot be imported or called."""
    found = find("reward", name)
    if not callable(found):
        raise ValueError(f"reward {name!r} is {found!r}: name a function (images, prompts) -> scores, or a class")
    return found


class CallableReward:
    """Calls `module:attribute` and checks what it returns: [B] scores, differentiable wherever the images are.

    attribute: a function (images [B, 3, H, W] in [0, 1], prompts) -> [B], or a class; a class is called with `device`
        and gives the function.
    """

    def __init__(self, name: str, device: str = "cpu"):
        self.name, found = name, find_callable(name)
        self.function: Reward = found(device=device) if isinstance(found, type) else found

    def __call__(self, images: "Tensor", prompts: list[str]) -> "Tensor":
        import torch

        version = images._version
        try:
            scores = self.function(images, prompts)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[1:2]  # the line of the user's function
            where = "".join(f" in {frame.filename}, line {frame.lineno}" for frame in frames)
            said = f"{type(error).__name__}{where}: {error}"
            called = f"f(images, prompts), images {list(images.shape)} {images.dtype} in [0, 1] and a list of texts"
            raise ValueError(f"the reward {self.name} raised {said}; it is called as {called}") from error
        if not isinstance(scores, torch.Tensor):
            wrong = f"must return a tensor, got a {type(scores).__name__}: torch.stack keeps the gradient"
        elif images._version != version:
            wrong = "writes into the images, which others read: take images.clone()"
        elif scores.shape != (len(images),):
            wrong = f"must return one score an image, [{len(images)}], not {list(scores.shape)}"
        elif images.requires_grad and not scores.requires_grad:
            wrong = "is not differentiable in the images: use torch operations, and no detach or no_grad"
        else:
            return scores
        raise ValueError(f"the reward {self.name} {wrong}")


def try_out(name: str, device: str, height: int, width: int, gradient: bool) -> None:
    """Raise ValueError where a function `name` does not score two random images of height x width pixels, or, with
    `gradient`, where the scores do not depend on them. A class, which may load a model, is only found.
    """
    if isinstance(find_callable(name), type):
        return
    import torch

    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    scores = CallableReward(name)(images.requires_grad_(gradient), ["a red circle", "two cats"])
    if gradient and torch.autograd.grad(scores.sum(), images, allow_unused=True)[0] is None:
        raise ValueError(f"the reward {name} does not depend on the images: nothing can be learnt from it")
