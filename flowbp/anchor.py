"""The anchor: a penalty that holds the trained velocity near the base model's, against rewards that are hacked.

The velocities v_i of M replayed nodes, at the latents x_i that the rollout has cached, add to the loss

    velocity    weight  mean (v_i - u_i)^2                   the KL divergence of the two flows' paths, up to a factor
    norm        weight  mean max(|v_i| - |u_i|, 0)^2 / D     only longer velocities are pulled back

u_i is the base model's velocity at the same x_i, noise level and prompt, without gradient. The means are over nodes,
samples and (velocity) the D entries of a latent; |v| is a sample's Euclidean norm. x_i is a constant, so the gradient
is exact. That is why the node of an open bridge, whose input carries gradient, takes no part. Under guidance v_i is
the network's velocity for the prompt, before it is guided; a negative branch with gradient is anchored alike.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowbp.guidance import Conditioning, GuidedVelocity


class Anchor:
    """reference: a context in which the network is the base model."""

    def __init__(
        self, kind: Literal["velocity", "norm"], weight: float, reference: Callable[[], AbstractContextManager]
    ):
        self.kind, self.weight, self.reference = kind, weight, reference
        self._drifts: list[Tensor] = []

    def around(self, guided: GuidedVelocity, count: int) -> GuidedVelocity:
        """`guided`, whose network adds the penalty's gradient to the cotangent of each velocity that has a graph. Each
        graph costs one more forward pass.

        count: the velocities that the mean is over, nodes times samples. Raises ValueError if there are none.
        """
        if count < 1:
            cause = "the anchor holds no node: the plan's only active node is an open bridge"
            raise ValueError(f"{cause}; let the method replay more nodes, set its alpha to 0, or leave anchor out")
        network = guided.network

        @functools.wraps(network)
        def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            if not torch.is_grad_enabled() or x.requires_grad:
                return network(x, sigma, conditioning)
            with torch.no_grad(), self.reference():
                base = network(x, sigma, conditioning)
            v = network(x, sigma, conditioning)
            pull = self._pull(v.detach(), base) / count
            v.register_hook(lambda g: g + pull.to(g.dtype))
            return v

        return replace(guided, network=velocity)

    def take_drift(self) -> float:
        """Mean over samples of |v - u| / |u| since the last call."""
        drifts, self._drifts = self._drifts, []
        return torch.cat(drifts).mean().item()

    def _pull(self, v: Tensor, base: Tensor) -> Tensor:
        """[B, *S] the gradient of the penalty of each sample's velocity."""
        wide = torch.promote_types(v.dtype, torch.float32)
        v, base = v.to(wide), base.to(wide)
        size, length = (torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True) for t in (v, base))
        gap = v - base
        self._drifts.append(gap.flatten(1).norm(dim=1) / length.flatten())
        if self.kind == "norm":
            gap = v * torch.relu(1 - length / size)
        return 2 * self.weight / v[0].numel() * gap
