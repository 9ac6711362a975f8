"""The rollout: Euler steps from noise to sample, caching only what the plan will read: latents, velocities, and graphs
if they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowbp.guidance import GuidedVelocity
from flowbp.plan import Node, PlanBatch, SurrogatePlan
from flowbp.replay import Recompute
from flowbp_kernels import RngState, cfg_euler_step
from flowbp_kernels.sweep import Graph, as_in_the_rollout, autocast_state, record

__all__ = ["NodeCache", "Trajectory", "rollout", "rollout_with_graph"]


class NodeCache:
    """One tensor [n, B, *S] that holds a row for each cached node of a trajectory."""

    def __init__(self, what: str, nodes: Iterable[int], like: Tensor):
        self.what, self.nodes = what, tuple(sorted(nodes))
        self._slot: dict[Any, int] = {node: slot for slot, node in enumerate(self.nodes)}
        self.rows = like.new_empty(len(self.nodes), *like.shape)

    def row(self, node: int) -> Tensor | None:
        """Where to write this node's value; None if the plan does not read it."""
        return self.rows[self._slot[node]] if node in self._slot else None

    def slots(self, nodes: Sequence[Node]) -> list:
        """Rows of `nodes` in `self.rows`, in the same nesting."""
        if any(isinstance(node, tuple) for node in nodes):
            return [
                self.slots(node) if isinstance(node, tuple) else self.slots([node]) * self.rows.shape[1]
                for node in nodes
            ]
        missing = [node for node in nodes if node not in self._slot]
        if missing:
            raise KeyError(
                f"the {self.what} of nodes {missing} are not cached (cached: {self.nodes}); roll out with the plan "
                "that reads them"
            )
        return [self._slot[node] for node in nodes]

    def __getitem__(self, node: Node) -> Tensor:
        """[B, *S] at `node`, or each sample's row at its own."""
        (slot,) = self.slots([node])
        return self.rows[slot] if isinstance(slot, int) else self.rows[slot, range(len(slot))]


@dataclass(frozen=True)
class Trajectory:
    """What is left of a rollout of N steps. Re-noised copy m of the sample is filed under node N + 1 + m.

    sigmas       [N + 1] noise levels, on the CPU
    levels       [N + 1 + M] `sigmas`, then the noise level of each of M copies, on the latents' device
    latents      x_i of the nodes that the plan reads; [B, *S] each
    velocities   v_i of the nodes that the plan reads, guided
    sample       [B, *S] x_N, or the latent after the last step taken when the plan stops early
    kept         graphs that the rollout kept, by node; each is given away once
    rng          random state before the forward pass of each active node that drew random numbers (dropout)
    autocast     state of autocast during the rollout
    """

    sigmas: Tensor
    levels: Tensor
    latents: NodeCache
    velocities: NodeCache
    sample: Tensor
    kept: dict[int, Graph] = field(default_factory=dict)
    rng: dict[Any, RngState] = field(default_factory=dict)
    autocast: tuple[dict, ...] = ()

    def level(self, node: Node) -> Tensor:
        """The noise level of `node`, [] or one a sample [B]."""
        return self.levels[list(node)] if isinstance(node, tuple) else self.levels[node]

    def graph(self, nodes: Sequence[Node], velocity: Callable[[Tensor, Tensor], Tensor], requires_grad: bool) -> Graph:
        """The forward pass of `nodes`, with its graph: kept by the rollout, or replayed, several nodes as one batch.

        velocity: (x [n B, *S], sigma [] or [n B]) -> [n B, *S]. Raises ValueError when a replay cannot draw the
        rollout's random numbers.
        """
        if len(nodes) == 1 and nodes[0] in self.kept:
            return self.kept.pop(nodes[0])
        visited = {i for node in nodes for i in (node if isinstance(node, tuple) else (node,))}
        if len(visited) > 1 and not self.rng.keys().isdisjoint(visited):
            raise ValueError(
                f"the network draws random numbers (dropout), and one forward pass at nodes {sorted(visited)} cannot "
                "repeat what the rollout drew at each: use nodes_per_forward=1 and one plan for the batch, or put the "
                "network in eval()"
            )
        if len(nodes) == 1:
            x, sigma = self.latents[nodes[0]], self.level(nodes[0])
        else:
            x = torch.cat([self.latents[node] for node in nodes])
            sigma = torch.cat([self.level(node).expand(len(self.sample)) for node in nodes])
        with as_in_the_rollout(x.device, self.autocast, self.rng.get(nodes[0])):
            return record(velocity, x, sigma, requires_grad)


@torch.no_grad()
def rollout(
    velocity: GuidedVelocity,
    noise: Tensor,
    sigmas: Tensor,
    plan: SurrogatePlan | PlanBatch | None = None,
    renoise: Sequence[Tensor] = (),
    recompute: Recompute | None = None,
) -> Trajectory:
    """Integrate dx/dsigma = v from `noise` [B, *S] along `sigmas` [N + 1]: x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i.

    Without a plan nothing is cached: plain sampling. With one, the rollout stops where the plan's reward input is
    known. `renoise` holds the standard normal noise [B, *S] of each of the plan's re-noised copies. `recompute` says
    which active nodes keep their graph; None keeps none, as must a batch of plans.
    """
    total, recompute = len(sigmas) - 1, recompute or Recompute()
    if plan is not None:
        plan.check(total)
    if isinstance(plan, PlanBatch):
        if len(plan.plans) != len(noise):
            raise ValueError(
                f"there are {len(plan.plans)} plans for a batch of {len(noise)} samples: pass one plan, or one a sample"
            )
        if recompute.mode != "always":
            raise ValueError(
                f"recompute={recompute.mode!r} keeps the graph of a node as the whole batch passes it, but with one "
                "plan a sample each "
                "sample has nodes of its own: use recompute='always', or one plan for the batch"
            )
    wanted = plan.num_renoised if plan is not None else 0
    if len(renoise) != wanted:
        raise ValueError(f"the plan re-noises {wanted} copies, but renoise holds noise for {len(renoise)}")
    latents = NodeCache("latents", plan.cached_latents if plan else (), noise)
    velocities = NodeCache("velocities", plan.cached_velocities if plan else (), noise)
    levels = torch.cat([sigmas, sigmas[-2].expand(wanted)]).to(noise.device)
    keeper = _Keeper(velocity, levels, plan, recompute)
    scale, last, steps = velocity.guidance.scale, sigmas[-2].item(), torch.diff(sigmas.double()).tolist()

    x = noise
    if (first := latents.row(0)) is not None:
        first.copy_(noise)
    for i in range(plan.num_steps(total) if plan else total):
        x, _ = cfg_euler_step(
            x, *keeper.branches(x, i), scale, steps[i], velocity_out=velocities.row(i), out=latents.row(i + 1)
        )
    for copy, eps in enumerate(renoise, start=total + 1):
        noised = latents[copy].copy_((1 - last) * x + last * eps)
        cfg_euler_step(noised, *keeper.branches(noised, copy), scale, -last, velocity_out=velocities.row(copy))
    return Trajectory(
        sigmas, levels, latents, velocities, x, keeper.kept, keeper.rng, autocast_state(noise.device.type)
    )


class _Keeper:
    """Runs the network along a rollout, and keeps what the sweep needs of each active node: its graph or its random
    state.
    """

    def __init__(
        self, velocity: GuidedVelocity, levels: Tensor, plan: SurrogatePlan | PlanBatch | None, recompute: Recompute
    ):
        self.velocity, self.levels, self.recompute = velocity, levels, recompute
        self.gated: dict[int, bool] = {}  # active node -> whether its input collects a gradient
        for replay in plan.sweep if plan else ():
            for node in replay.node if isinstance(replay.node, tuple) else (replay.node,):
                self.gated[node] = replay.gated
        self.remaining = len(self.gated)
        self.kept: dict[int, Graph] = {}
        self.rng: dict[int, RngState] = {}
        recompute.begin(levels.device)

    def branches(self, x: Tensor, node: int) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg) at `node`, or (v, None) where a graph was recorded."""
        sigma = self.levels[node]
        if node not in self.gated:
            return self.velocity.branches(x, sigma)
        before = RngState.capture(x.device)
        own = x.clone()  # later rows of the cache are written in place, which a graph on a view of it would refuse
        graph, kept = self.recompute.record(
            self.remaining, lambda: record(self.velocity, own, sigma, self.gated[node]), x.device
        )
        branches = self.velocity.branches(x, sigma, replayed=True) if graph is None else (graph.v.detach(), None)
        if kept and graph is not None:
            self.kept[node] = graph
        if RngState.capture(x.device) != before:
            self.rng[node] = before
        self.remaining -= 1
        return branches


def rollout_with_graph(velocity: GuidedVelocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_N [B, *S] with the autograd graph of the whole Euler chain: every Jacobian chained, memory grows with N.

    The ground truth that surrogates are judged by, affordable for small models only.
    """
    x, device_sigmas = noise, sigmas.to(noise.device)
    for i, h in enumerate(torch.diff(sigmas.double()).tolist()):
        x = x + h * velocity(x, device_sigmas[i])
    return x
