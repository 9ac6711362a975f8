"""What the trainer asks of a backbone."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from flowbp.guidance import Conditioning

__all__ = ["Backbone"]


class Backbone(Protocol):
    """A text-to-image flow model in five verbs. Latents have the backbone's own shape [B, *S]; packing is its own affair."""

    pipe: object  # the diffusers pipeline: for saving and loading weights in its own format
    denoiser: nn.Module  # the network that gives the velocity: the trainable part
    lora_targets: list[str]  # modules of the denoiser that LoRA adapts by default

    def encode(self, prompts: list[str]) -> Conditioning:
        """Text conditioning of `prompts`, without gradient."""
        ...

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """[num_steps + 1] float32 noise levels on the CPU, decreasing to 0, for images of height x width pixels."""
        ...

    def noise(self, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
        """Standard normal latents [B, *S] at the first noise level, one generator a sample."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at latents x [B, *S] and noise level sigma [], in x.dtype."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], differentiable in the clean latents x."""
        ...
