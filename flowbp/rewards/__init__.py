"""Rewards: image-text scorers behind one protocol. Scores [B] are differentiable in the pixels; higher is better.

A reward model is one file here, on transformers alone, and one entry of `published.yaml`, which says where its
checkpoint is.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flowbp.rewards.base import ImageEncoder, Relative, Reward, Smoothing
from flowbp.rewards.registry import REWARDS, RewardSource, check_options, load_reward

if TYPE_CHECKING:  # imports torch, without which a config is checked
    from flowbp.rewards.weighted import RunningScale, Smoothed, Term, WeightedRewards

__all__ = ["REWARDS", "RewardSource", "check_options", "load_reward"]
__all__ += ["ImageEncoder", "Relative", "Reward", "Smoothed", "Smoothing", "RunningScale", "Term", "WeightedRewards"]


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module(f"{__name__}.weighted"), name)
