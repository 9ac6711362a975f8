"""Rewards: image-text scorers behind one protocol. Scores [B] are differentiable in the pixels; higher is better.

A reward model is one file here, on transformers alone, and one entry of `published.yaml`, which says where its
checkpoint is.
"""

from flowbp.rewards.base import ImageEncoder, Relative, Reward, Smoothing
from flowbp.rewards.registry import REWARDS, RewardSource, check_options, load_reward

__all__ = ["REWARDS", "ImageEncoder", "Relative", "Reward", "RewardSource", "Smoothing", "check_options", "load_reward"]
