"""The surrogate backward trajectory: pulls a reward gradient through the active nodes of a cached rollout.

`flowbp_kernels.sweep` has the formula and runs every plan. The reward's input is read from the cache, so its gradient
g is known before any network graph exists. A graph that the rollout kept (`flowbp.replay`) is a replay whose forward
pass has already happened.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowbp.plan import Copy, Node, Plan, Replay
from flowbp.trajectory import Trajectory
from flowbp_kernels import leap_residuals, quadrature_update
from flowbp_kernels.sweep import Graph, sweep

# (x [n B, *S], sigma [] or [n B]) -> a tensor [n B, *S] with the velocity's VJP
ReplayedVelocity = Callable[[Tensor, Tensor], Tensor]


def reward_input(plan: Plan, trajectory: Trajectory) -> Tensor:
    """What the reward model sees, [(1 + num_renoised) B, *S]: the sample or a posterior mean, then the denoised copies.
    It carries no gradient.
    """
    base = trajectory.sample if plan.reward_input is None else _posterior_mean(trajectory, plan.reward_input.at)
    return torch.cat([base, *(_posterior_mean(trajectory, Copy(m)) for m in range(plan.num_renoised))])


def backward(
    plan: Plan,
    trajectory: Trajectory,
    velocity: ReplayedVelocity,
    grad_reward: Tensor,
    *,
    nodes_per_forward: int = 1,
    before_last: Callable[[Tensor], object] | None = None,
) -> None:
    """Pull dR/d(reward_input) back into the parameters' .grad, by the sweep over the plan's active nodes.

    grad_reward        shaped as `reward_input`
    nodes_per_forward  nodes that one batched replay takes together; a bridge node is replayed alone
    before_last        is called with the last velocity before its backward pass: from then on a distributed wrapper may
                       reduce gradients

    One network graph is alive at a time, beside those that the rollout kept. Raises RuntimeError when a replay records
    no graph.
    """
    passes = _passes(plan, trajectory, nodes_per_forward)

    def forward(replays: Sequence[Any]) -> Graph:
        graph = trajectory.graph([replay.node for replay in replays], velocity, requires_grad=replays[0].gated)
        if before_last is not None and replays is passes[-1]:
            before_last(graph.v)
        return graph

    def pull(x: Tensor, v: Tensor, seed: Tensor) -> Tensor | None:
        v.backward(seed)  # torch.autograd.grad would run no hook that reduces sharded gradients
        return x.grad

    sweep(grad_reward.split(len(trajectory.sample)), passes, forward, pull)


def residuals(plan: Plan, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """(d_j, d_0), each [B]: per-sample mean absolute gap between the plan's two quadratures and the cached latents x_j
    and x_N.

    d_j: from x_start by the nodes before the bridge j.  d_0: from x_j by the nodes from j on.
    Raises ValueError for a plan without similarity, whose rollout does not cache the velocities.
    """
    if plan.similarity is None:
        raise ValueError("residuals need a plan with similarity, for which the rollout caches the velocities they read")
    start, joint, nodes, first, second = plan.leaps
    x, v = trajectory.latents, trajectory.velocities
    d_j, d_0 = leap_residuals(x[start], x[joint], trajectory.sample, v.rows, v.slots(nodes), (first, second))
    return d_j, d_0


def _passes(plan: Plan, trajectory: Trajectory, nodes_per_forward: int) -> list[list[Replay]]:
    """The forward passes of the sweep, clean end first, of at most nodes_per_forward replays each. A node with a kept
    graph or an open gate has a pass of its own.
    """
    if nodes_per_forward < 1:
        raise ValueError(f"nodes_per_forward must be at least 1, got {nodes_per_forward}")
    passes: list[list[Replay]] = []
    alone = True  # whether the last pass takes no other node
    for replay in reversed(plan.replays):
        single = replay.gated or replay.node in trajectory.kept
        if alone or single or len(passes[-1]) == nodes_per_forward:
            passes.append([replay])
        else:
            passes[-1].append(replay)
        alone = single
    return passes


def _posterior_mean(trajectory: Trajectory, node: Node) -> Tensor:
    """x - sigma v at a cached node, [B, *S]."""
    velocities, sigma = trajectory.velocities, trajectory.sigma(node)
    weights: list = [[-level for level in sigma] if isinstance(sigma, tuple) else -sigma]
    return quadrature_update(trajectory.latents[node], velocities.rows, velocities.slots([node]), weights)
