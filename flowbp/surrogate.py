"""The surrogate backward trajectory: pulls a reward gradient through the active nodes of a cached rollout.

One engine for every plan. The reward's input is read from the cache, so its gradient g is known before anything is re-forwarded; then the
active nodes are replayed one at a time, clean end to noise end. Peak memory is one node's graph, whatever the size of the active set.

    dR/dtheta = sum_i w_i (dv_i/dtheta)^T c_i        c_i = g,  and past a bridge j (i < j)   c_i = g + alpha w_j (dv_j/dx)^T g
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowbp.plan import SurrogatePlan
from flowbp.trajectory import Trajectory
from flowbp_kernels import leap_residuals, quadrature_update, straight_through

__all__ = ["as_graph", "backward", "residuals", "reward_input"]

ReplayedVelocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, *S], sigma []) -> a tensor [B, *S] with the velocity's VJP


def reward_input(plan: SurrogatePlan, trajectory: Trajectory) -> Tensor:
    """What the reward model sees, [(1 + num_renoised) B, *S]: the sample or a posterior mean, then the denoised copies. No gradient."""
    if plan.reward_input is None:
        base = trajectory.sample
    else:
        e = plan.reward_input.at
        velocities = trajectory.velocities
        base = quadrature_update(trajectory.latents[e], velocities.rows, velocities.slots([e]), [-trajectory.sigmas[e].item()])
    copies = trajectory.renoised - trajectory.sigmas[-2].item() * trajectory.renoised_velocities
    return torch.cat([base[None], copies]).flatten(0, 1)


def backward(plan: SurrogatePlan, trajectory: Trajectory, velocity: ReplayedVelocity, grad_reward: Tensor) -> None:
    """Pull dR/d(reward_input) back into the parameters' .grad; one network graph is alive at a time.

    grad_reward: shaped as `reward_input`. Cotangents are kept in float32 (or wider) and cast once a node. Raises RuntimeError when a replay
    records no graph, because nothing would be learned from it.
    """
    batch = len(trajectory.sample)
    cotangent, *copy_cotangents = _wide(grad_reward).split(batch)
    sigmas = trajectory.sigmas.to(cotangent.device)

    for x, copy_cotangent in zip(trajectory.renoised, copy_cotangents, strict=True):
        _pull_back(velocity, x, sigmas[-2], plan.grad_weights[-1] * copy_cotangent)
    for i, weight in reversed(plan.active):  # clean end -> noise end
        at_bridge = plan.active_bridge is not None and i == plan.active_bridge.node
        x = trajectory.latents[i].detach().requires_grad_(at_bridge)
        _pull_back(velocity, x, sigmas[i], weight * cotangent)
        if at_bridge:
            cotangent = cotangent + plan.active_bridge.alpha * x.grad


def as_graph(plan: SurrogatePlan, trajectory: Trajectory, velocity: ReplayedVelocity) -> Tensor:
    """The reward input as one ordinary autograd graph: the value of `reward_input`, the gradient of `backward`.

    All active nodes' graphs live at once. The oracle of the sweep, and the mode for those with memory to spare.
    """
    sigmas = trajectory.sigmas.to(trajectory.sample.device)
    before, after = 0.0, 0.0  # sums of weight (v - v.detach()): zero in value, on either side of the bridge
    bridge = plan.active_bridge
    for i, weight in plan.active:
        x = trajectory.latents[i]
        if bridge is not None and i == bridge.node:
            x = straight_through(x, before, bridge.alpha)
        v = velocity(x, sigmas[i])
        if bridge is not None and i < bridge.node:
            before = before + weight * (v - v.detach())
        else:
            after = after + weight * (v - v.detach())
    value, *copy_values = reward_input(plan, trajectory).split(len(trajectory.sample))
    outputs = [straight_through(value, before + after)]
    for x, copy_value in zip(trajectory.renoised, copy_values, strict=True):
        outputs.append(straight_through(copy_value, plan.grad_weights[-1] * velocity(x, sigmas[-2])))
    return torch.cat(outputs)


def residuals(plan: SurrogatePlan, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """(d_j, d_0), each [B]: per-sample mean absolute gap between the plan's two quadratures and the cached latents x_j and x_N.

    d_j: from x_start by the nodes before the bridge j;  d_0: from x_j by the nodes from j on. The plan must have a similarity.
    """
    if plan.similarity is None:
        raise ValueError("residuals need a plan with similarity: without it the rollout does not cache the velocities they read")
    j = plan.bridge.node
    to_j = [weight if node < j else 0.0 for node, weight in zip(plan.nodes, plan.weights, strict=True)]
    to_end = [weight if node >= j else 0.0 for node, weight in zip(plan.nodes, plan.weights, strict=True)]
    x, velocities = trajectory.latents, trajectory.velocities
    return tuple(leap_residuals(x[plan.start], x[j], trajectory.sample, velocities.rows, velocities.slots(plan.nodes), (to_j, to_end)))


def _pull_back(velocity: ReplayedVelocity, x: Tensor, sigma: Tensor, seed: Tensor) -> None:
    with torch.enable_grad():
        v = velocity(x, sigma)
    if not v.requires_grad:
        raise RuntimeError("a replayed velocity carries no gradient: no parameter of the network requires grad, or it ran under no_grad")
    v.backward(seed.to(v.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
