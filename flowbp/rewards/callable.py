"""A reward of your own: any Python function of images and prompts. A config names it as "module:function"."""

import traceback
from typing import TYPE_CHECKING, Any

from flowbp.given import find
from flowbp.rewards.base import Reward

if TYPE_CHECKING:  # that there is no such function is told without torch
    from torch import Tensor


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
