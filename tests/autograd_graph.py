"""What the sweep is judged by: the surrogate as one ordinary autograd graph."""

from typing import Any

import torch
from torch import Tensor

from flowbp.plan import SurrogatePlan
from flowbp.surrogate import ReplayedVelocity, reward_input
from flowbp.trajectory import Trajectory
from flowbp_kernels import straight_through


def as_graph(plan: SurrogatePlan, trajectory: Trajectory, velocity: ReplayedVelocity) -> Tensor:
    """The reward input as one ordinary autograd graph of one plan: the value of `reward_input`, the gradient of
    `backward`. All active nodes' graphs live at once.

    Nodes are taken from the noise end, against the order of the sweep, because the graph of the bridge is built on the
    velocities before it.
    """
    values = reward_input(plan, trajectory).split(len(trajectory.sample))
    # Sums of weight (v - v.detach()), zero in value: into the bridge's latent, and by output.
    joint: Any = 0.0
    sums: list[Any] = [0.0] * len(values)
    bridge = plan.active_bridge
    for node, weight, gate, output, share in plan.replays:
        x = trajectory.latents[node]
        v = velocity(straight_through(x, joint, gate) if gate else x, trajectory.level(node))
        if bridge is not None and not output and node < bridge.node:
            joint = joint + share * weight * (v - v.detach())
        sums[output] = sums[output] + weight * (v - v.detach())
    return torch.cat([straight_through(value, surrogate) for value, surrogate in zip(values, sums, strict=True)])
