"""The rollout: Euler steps from noise to sample, caching only what the plan will read: latents, velocities, and graphs if they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowbp.guidance import GuidedVelocity
from flowbp.plan import SurrogatePlan
from flowbp.replay import Graph, Recompute, record
from flowbp_kernels import RngState, cfg_euler_step
from flowbp_kernels.recompute import autocast_state

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
    rng: dict[int, RngState] = field(default_factory=dict)
    autocast: tuple[dict, ...] = ()

    def graph(self, nodes: Sequence[int], velocity: Callable[[Tensor, Tensor], Tensor], requires_grad: bool) -> Graph:
        """The forward pass of `nodes`, with its graph: the one kept by the rollout, or a replay; several are replayed as one batch.

        velocity: (x [n B, *S], sigma [] or [n B]) -> [n B, *S]. Raises ValueError when a replay cannot draw the rollout's random numbers.
        """
        if len(nodes) == 1 and nodes[0] in self.kept:
            return self.kept.pop(nodes[0])
        x = torch.cat([self.latents[node] for node in nodes]) if len(nodes) > 1 else self.latents[nodes[0]]
        sigma = self.levels[list(nodes)].repeat_interleave(len(self.sample)) if len(nodes) > 1 else self.levels[nodes[0]]
        with self._as_in_the_rollout(nodes):
            return record(velocity, x, sigma, requires_grad)

    @contextmanager
    def _as_in_the_rollout(self, nodes: Sequence[int]) -> Iterator[None]:
        """Random state and autocast of the rollout at `nodes`; both are left as they were found."""
        if len(nodes) > 1 and not self.rng.keys().isdisjoint(nodes):
            raise ValueError(
                "the network draws random numbers (dropout), which one batched forward pass would draw in another order than the rollout: "
                "set nodes_per_forward to 1, or put the network in eval()"
            )
        found = RngState.capture(self.sample.device)
        with ExitStack() as stack:
            for state in self.autocast:
                stack.enter_context(torch.autocast(**state))
            if nodes[0] in self.rng:
                stack.callback(found.restore)
                self.rng[nodes[0]].restore()
            yield
        if RngState.capture(self.sample.device) != found:
            raise RuntimeError("the replay drew random numbers (dropout), the rollout none: call both in the same mode, train() or eval()")


@torch.no_grad()
def rollout(
    velocity: GuidedVelocity,
    noise: Tensor,
    sigmas: Tensor,
    plan: SurrogatePlan | None = None,
    renoise: Sequence[Tensor] = (),
    recompute: Recompute | None = None,
) -> Trajectory:
    """Integrate dx/dsigma = v from `noise` [B, *S] along `sigmas` [N + 1]: x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i.

    Without a plan nothing is cached: plain sampling. With one, the rollout stops where the plan's reward input is known. `renoise` holds
    the standard normal noise [B, *S] of each of the plan's re-noised copies. `recompute` says which active nodes keep their graph; None
    keeps none.
    """
    total = len(sigmas) - 1
    if plan is not None:
        plan.check(total)
    wanted = plan.num_renoised if plan is not None else 0
    if len(renoise) != wanted:
        raise ValueError(f"the plan re-noises {wanted} copies, but renoise holds noise for {len(renoise)}")
    latents = NodeCache("latents", plan.cached_latents if plan else (), noise)
    velocities = NodeCache("velocities", plan.cached_velocities if plan else (), noise)
    levels = torch.cat([sigmas, sigmas[-2].expand(wanted)]).to(noise.device)
    keeper = _Keeper(velocity, levels, {replay.node: replay.gate > 0 for replay in plan.sweep} if plan else {}, recompute or Recompute())
    scale, last, steps = velocity.guidance.scale, sigmas[-2].item(), torch.diff(sigmas).tolist()

    x = noise
    if latents.row(0) is not None:
        latents.row(0).copy_(noise)
    for i in range(plan.num_steps(total) if plan else total):
        x, _ = cfg_euler_step(x, *keeper.branches(x, i), scale, steps[i], velocity_out=velocities.row(i), out=latents.row(i + 1))
    for copy, eps in enumerate(renoise, start=total + 1):
        noised = latents.row(copy).copy_((1 - last) * x + last * eps)
        cfg_euler_step(noised, *keeper.branches(noised, copy), scale, -last, velocity_out=velocities.row(copy))
    return Trajectory(sigmas, levels, latents, velocities, x, keeper.kept, keeper.rng, autocast_state(noise.device.type))


class _Keeper:
    """Runs the network along a rollout, and keeps what the sweep needs of each active node: its graph or its random state."""

    def __init__(self, velocity: GuidedVelocity, levels: Tensor, active: dict[int, bool], recompute: Recompute):
        self.velocity, self.levels, self.active, self.recompute = velocity, levels, active, recompute
        self.remaining = len(active)
        self.kept: dict[int, Graph] = {}
        self.rng: dict[int, RngState] = {}
        recompute.begin(levels.device)

    def branches(self, x: Tensor, node: int) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg) at `node`, or (v, None) where a graph was recorded."""
        sigma = self.levels[node]
        if node not in self.active:
            return self.velocity.branches(x, sigma)
        before = RngState.capture(x.device)
        own = x.clone()  # later rows of the cache are written in place, which a graph on a view of it would refuse
        graph, kept = self.recompute.record(self.remaining, lambda: record(self.velocity, own, sigma, self.active[node]), x.device)
        branches = self.velocity.branches(x, sigma, replayed=True) if graph is None else (graph.v.detach(), None)
        if kept:
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
    for i, h in enumerate(torch.diff(sigmas).tolist()):
        x = x + h * velocity(x, device_sigmas[i])
    return x
