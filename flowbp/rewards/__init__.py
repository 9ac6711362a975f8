"""Rewards: image-text scorers behind one protocol, [B] scores differentiable in the pixels, higher is better."""

from __future__ import annotations

from flowbp.rewards.base import Reward, Smoothed
from flowbp.rewards.clip import CLIPReward

__all__ = ["REWARDS", "CLIPReward", "Reward", "Smoothed", "load_reward"]

REWARDS: dict[str, type] = {"clip": CLIPReward}


def load_reward(name: str, model: str, device: str = "cpu") -> Reward:
    """The reward class `name` with the weights of `model`: a local folder, a Hub id, or "shapes" / "shapes-monitor" (embedded)."""
    from flowbp import shapes

    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}")
    return REWARDS[name](str({"shapes": shapes.REWARD, "shapes-monitor": shapes.MONITOR}.get(model, model)), device=device)
