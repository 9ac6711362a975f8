"""The rollout: Euler steps from noise to sample without gradient, caching only what the plan will read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp.guidance import GuidedVelocity
from flowbp.plan import SurrogatePlan
from flowbp_kernels import cfg_euler_step

__all__ = ["NodeCache", "Trajectory", "rollout", "rollout_with_graph"]


class NodeCache:
    """One tensor [n, B, *S] that holds a row for each cached node of a trajectory."""

    def __init__(self, what: str, nodes: Iterable[int], like: Tensor):
        self.what, self.nodes = what, tuple(sorted(nodes))
        self._slot = {node: slot for slot, node in enumerate(self.nodes)}
        self.rows = like.new_empty(len(self.nodes), *like.shape)

    def row(self, node: int) -> Tensor | None:
        """Where to write this node's value; None if the plan does not read it."""
        return self.rows[self._slot[node]] if node in self._slot else None

    def slots(self, nodes: Sequence[int]) -> list[int]:
        """Rows of `nodes` in `self.rows`."""
        missing = [node for node in nodes if node not in self._slot]
        if missing:
            raise KeyError(
                f"the {self.what} of nodes {missing} are not cached (cached: {self.nodes}); roll out with the plan that reads them"
            )
        return [self._slot[node] for node in nodes]

    def __getitem__(self, node: int) -> Tensor:
        return self.rows[self.slots([node])[0]]


@dataclass(frozen=True)
class Trajectory:
    """What is left of a rollout of N steps.

    sigmas       [N + 1] noise levels, on the CPU
    latents      x_i of the nodes that the plan reads; [B, *S] each
    velocities   v_i of the nodes that the plan reads, guided
    sample       [B, *S] x_N, or the latent after the last step taken when the plan stops early
    renoised     [M, B, *S] copies of the sample at the last noise level, and their velocities; empty unless the plan asks for them
    """

    sigmas: Tensor
    latents: NodeCache
    velocities: NodeCache
    sample: Tensor
    renoised: Tensor
    renoised_velocities: Tensor


@torch.no_grad()
def rollout(
    velocity: GuidedVelocity, noise: Tensor, sigmas: Tensor, plan: SurrogatePlan | None = None, renoise: Sequence[Tensor] = ()
) -> Trajectory:
    """Integrate dx/dsigma = v from `noise` [B, *S] along `sigmas` [N + 1]: x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i.

    Without a plan nothing is cached: plain sampling. With one, the rollout stops where the plan's reward input is known. `renoise` holds
    the standard normal noise [B, *S] of each of the plan's re-noised copies.
    """
    total = len(sigmas) - 1
    if plan is not None:
        plan.check(total)
    wanted = plan.num_renoised if plan is not None else 0
    if len(renoise) != wanted:
        raise ValueError(f"the plan re-noises {wanted} copies, but renoise holds noise for {len(renoise)}")
    latents = NodeCache("latents", plan.cached_latents if plan else (), noise)
    velocities = NodeCache("velocities", plan.cached_velocities if plan else (), noise)
    device_sigmas, steps = sigmas.to(noise.device), torch.diff(sigmas).tolist()

    x = noise
    if latents.row(0) is not None:
        latents.row(0).copy_(noise)
    for i in range(plan.num_steps(total) if plan else total):
        branches = velocity.branches(x, device_sigmas[i])
        slots = {"velocity_out": velocities.row(i), "out": latents.row(i + 1)}
        x, _ = cfg_euler_step(x, *branches, velocity.guidance.scale, steps[i], **slots)

    copies, copy_velocities = noise.new_empty(wanted, *noise.shape), noise.new_empty(wanted, *noise.shape)
    for m in range(wanted):
        copies[m] = (1 - sigmas[-2].item()) * x + sigmas[-2].item() * renoise[m]
        copy_velocities[m] = velocity(copies[m], device_sigmas[-2])
    return Trajectory(sigmas, latents, velocities, x, copies, copy_velocities)


def rollout_with_graph(velocity: GuidedVelocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_N [B, *S] with the autograd graph of the whole Euler chain: every Jacobian chained, memory grows with N.

    The ground truth that surrogates are judged by, affordable for small models only.
    """
    x, device_sigmas = noise, sigmas.to(noise.device)
    for i, h in enumerate(torch.diff(sigmas).tolist()):
        x = x + h * velocity(x, device_sigmas[i])
    return x
