"""A reward of your own: any Python function of images and prompts. A config names it as "module:function"."""

from torch import Tensor

from flowbp.names import find
from flowbp.rewards.base import Reward


class CallableReward:
    """Calls `module:attribute` and checks what it returns: [B] scores, differentiable wherever the images are.

    attribute: a function (images [B, 3, H, W] in [0, 1], prompts) -> [B], or a class; a class is called with `device`
        and gives the function.
    """

    def __init__(self, name: str, device: str = "cpu"):
        found = find("reward", name)
        self.name = name
        self.function: Reward = found(device=device) if isinstance(found, type) else found

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = self.function(images, prompts)
        if scores.shape != (len(images),):
            wanted = f"one score an image, [{len(images)}]"
            raise ValueError(f"the reward {self.name} must return {wanted}, not {list(scores.shape)}")
        if images.requires_grad and not scores.requires_grad:
            way_out = "use torch operations, and no detach or no_grad"
            raise ValueError(f"the reward {self.name} is not differentiable in the images: {way_out}")
        return scores
