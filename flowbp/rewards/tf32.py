"""A reward in float32 whose matrix products, and those of its gradient, may take TF32."""

from torch import Tensor

from flowbp.rewards.base import ImageEncoder, Reward
from flowbp_kernels import in_tf32


class InTF32:
    """The scores of `reward`, by `flowbp_kernels.in_tf32`. Its embeddings, if it has any, stay in float32."""

    def __init__(self, reward: Reward):
        self.reward = reward
        if isinstance(reward, ImageEncoder):
            self.embed = reward.embed

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return in_tf32(lambda x: self.reward(x, prompts), images)
