"""Rewards: image-text scorers behind one protocol, [B] scores differentiable in the pixels, higher is better.

A reward model is one file here, on transformers alone, and one entry of `registry.REWARDS`, which says where its
checkpoint is.
"""

from flowbp.rewards.base import ImageEncoder, Reward, Smoothed, Smoothing
from flowbp.rewards.registry import REWARDS, RewardSource, check_options, load_reward
from flowbp.rewards.weighted import RunningScale, Term, WeightedRewards

__all__ = [
    "REWARDS",
    "ImageEncoder",
    "WeightedRewards",
    "Reward",
    "RewardSource",
    "RunningScale",
    "Smoothed",
    "Smoothing",
    "Term",
    "check_options",
    "load_reward",
]
