"""The rollout: a solver's steps from noise to sample without gradient. The rollout caches the latents and velocities
that the plan reads, and those graphs that `recompute` keeps.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.plan import Copy, Node, Number, Place, Plan, PlanBatch, in_order
from flowbp.quadrature import ORDERS, Solver, solver_table
from flowbp.replay import Recompute
from flowbp_kernels import RngState, cfg_euler_step, cfg_multistep_step
from flowbp_kernels.sweep import Graph, as_in_the_rollout, autocast_state, record


class NodeCache:
    """One tensor [n + ring, B, *S] with a row for each cached node and each copy of the sample. Behind them is a ring
    of rows, in which the last nodes lie that no plan reads.
    """

    def __init__(self, what: str, nodes: Iterable[Place], like: Tensor, ring: int = 0):
        self.what, self.nodes, self.ring = what, tuple(in_order(nodes)), ring
        self._slot = {node: slot for slot, node in enumerate(self.nodes)}
        self.rows = like.new_empty(len(self.nodes) + ring, *like.shape)

    def row(self, node: Place) -> Tensor | None:
        """Where to write this node's value; None if nothing reads it."""
        return self.rows[self.last_slot(node)] if self.ring or node in self._slot else None

    def last_slot(self, node: Any) -> int:
        """Which of `self.rows` holds one of the last `ring` nodes."""
        return self._slot[node] if node in self._slot else len(self.nodes) + node % self.ring

    def slots(self, nodes: Sequence[Node]) -> list:
        """Which of `self.rows` belongs to each of `nodes`: an int, or one a sample where a node of `nodes` is a tuple.

        As soon as one entry is a tuple, all are spelled out for each sample.
        """
        if any(isinstance(node, tuple) for node in nodes):
            batch = self.rows.shape[1]
            return [self.slots(node) if isinstance(node, tuple) else self.slots([node]) * batch for node in nodes]
        if missing := [node for node in nodes if node not in self._slot]:
            cached = f"are not cached (cached: {self.nodes})"
            raise KeyError(f"the {self.what} of nodes {missing} {cached}; roll out with the plan that reads them")
        return [self._slot[node] for node in nodes]

    def __getitem__(self, node: Node) -> Tensor:
        """[B, *S] at `node`, or each sample's row at its own."""
        (slot,) = self.slots([node])
        return self.rows[slot] if isinstance(slot, int) else self.rows[slot, range(len(slot))]


def ring_rows(solver: Solver, guidance: Guidance) -> int:
    """How many of the last velocities a rollout keeps though no plan reads them: those that a step of `solver` reads
    (Euler: none), and at least one under guidance, because a step rounds its velocity to the dtype of the row.
    """
    return max(ORDERS[solver] if ORDERS[solver] > 1 else 0, int(guidance.active))


@dataclass(frozen=True)
class Trajectory:
    """What is left of a rollout of N steps.

    levels       [N + 1] noise levels, on the latents' device; `sigmas` holds them as numbers
    latents      x_i of the nodes and copies that the plan reads; [B, *S] each
    velocities   v_i of the nodes and copies that the plan reads, guided
    sample       [B, *S] x_N, or the latent after the last step taken when the plan stops early
    kept         graphs that the rollout kept, by node; each is given away once
    rng          random state before the forward pass of each active node that drew random numbers (dropout)
    autocast     state of autocast during the rollout
    """

    levels: Tensor
    sigmas: tuple[float, ...]
    latents: NodeCache
    velocities: NodeCache
    sample: Tensor
    kept: dict[Place, Graph] = field(default_factory=dict)
    rng: dict[Place, RngState] = field(default_factory=dict)
    autocast: tuple[dict, ...] = ()

    def sigma(self, node: Node) -> Number:
        """As `level`, in numbers: no copy from the device."""
        if isinstance(node, Copy):
            return self.sigmas[-2]
        return tuple(self.sigmas[i] for i in node) if isinstance(node, tuple) else self.sigmas[node]

    def level(self, node: Node) -> Tensor:
        """The noise level of `node`, [] or one a sample [B]. Copies are at the last level before 0."""
        if isinstance(node, Copy):
            return self.levels[-2]
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
            cause = f"one forward pass at nodes {in_order(visited)} cannot repeat the rollout's draws (dropout) at each"
            way_out = "use nodes_per_forward=1 and one plan for the batch, or put the network in eval()"
            raise ValueError(f"{cause}: {way_out}")
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
    plan: Plan | None = None,
    renoise: Sequence[Tensor] = (),
    recompute: Recompute | None = None,
    solver: Solver = "euler",
) -> Trajectory:
    """Integrate dx/dsigma = v from `noise` [B, *S] along `sigmas` [N + 1]: x_{n+1} = x_n + sum_i B[n, i] v_i, with the
    table B of `flowbp.quadrature.solver_table`. Euler: x_{n+1} = x_n + (sigma_{n+1} - sigma_n) v_n.

    Without a plan nothing is cached: plain sampling. With one, the rollout stops where the plan's reward input is
    known. `renoise` holds the standard normal noise [B, *S] of each of the plan's re-noised copies. `recompute` says
    which active nodes keep their graph; None keeps none, and a batch of plans must keep none.
    """
    total, copies = len(sigmas) - 1, plan.num_renoised if plan else 0
    if plan is not None:
        plan.check(total, len(noise))
    if len(renoise) != copies:
        raise ValueError(f"the plan re-noises {copies} copies, but renoise holds noise for {len(renoise)}")
    latents = NodeCache("latents", plan.cached_latents if plan else (), noise)
    table, visited = solver_table(sigmas.double().cpu().numpy(), solver), plan.num_steps(total) if plan else total
    velocities: Any = None
    levels, numbers = sigmas.to(noise.device), tuple(sigmas.tolist())
    recorder = _Recorder(plan, recompute or Recompute(), noise.device)
    guidance, last = velocity.guidance, numbers[-2]
    if plan is not None and plan.reward_input is not None:
        table[-1] = [*[0.0] * (total - 1), -last]  # an Euler step ends at the posterior mean, of which copies are made

    x = noise
    if (first := latents.row(0)) is not None:
        first.copy_(noise)
    for i in range(visited):
        v, v_neg = recorder.branches(velocity.at(numbers[i]), x, levels[i], i)
        if i == 0:  # In the network's dtype nothing is lost, except where velocities are guided.
            like, ring = noise if guidance.active else v, ring_rows(solver, guidance)
            velocities = NodeCache("velocities", plan.cached_velocities if plan else (), like, ring)
        # One pass over the latent: guide v_neg and v, where there are two; step; write the rows of both caches.
        row, out = velocities.row(i), latents.row(i + 1)
        (earlier,) = table[i, :i].nonzero()
        rule = [velocities.last_slot(int(node)) for node in earlier], table[i, earlier].tolist()
        x, _ = cfg_multistep_step(
            x, v, v_neg, guidance.scale, float(table[i, i]), velocities.rows, *rule, velocity_out=row, out=out
        )
    for m, eps in enumerate(renoise):
        noised = latents[Copy(m)].copy_((1 - last) * x + last * eps)
        v, v_neg = recorder.branches(velocity.at(last), noised, levels[-2], Copy(m))
        cfg_euler_step(noised, v, v_neg, guidance.scale, -last, velocity_out=velocities.row(Copy(m)))
    autocast = autocast_state(noise.device.type)
    return Trajectory(levels, numbers, latents, velocities, x, recorder.kept, recorder.rng, autocast)


class _Recorder:
    """Runs the network along a rollout. Of each active node it keeps what the sweep will need: the graph, where
    `recompute` says so, or the random state from which a replay draws the same numbers.
    """

    def __init__(self, plan: Plan | None, recompute: Recompute, device: torch.device):
        if isinstance(plan, PlanBatch) and recompute.mode != "always":
            cause = f"recompute={recompute.mode!r} keeps the graph of a node for the whole batch"
            raise ValueError(f"{cause}: with one plan a sample use recompute='always', or use one plan for the batch")
        self.recompute = recompute
        self.gated: dict[Place, bool] = {}  # active node -> whether its input collects a gradient
        for replay in plan.replays if plan else ():
            nodes = replay.node if isinstance(replay.node, tuple) else (replay.node,)
            self.gated |= dict.fromkeys(nodes, replay.gated)
        self.remaining = len(self.gated)  # active nodes from here to the clean end
        self.kept: dict[Place, Graph] = {}
        self.rng: dict[Place, RngState] = {}
        recompute.begin(device)

    def branches(self, velocity: GuidedVelocity, x: Tensor, sigma: Tensor, node: Place) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg), still to be guided; or (v, None) with the whole velocity, where there is no guidance or where
        a graph was recorded: the sweep differentiates the guided velocity, so that is what is recorded.
        """
        if node not in self.gated:
            return velocity.branches(x, sigma)
        before = RngState.capture(x.device)

        def forward() -> Graph:
            # A copy of x: x may be a row of the cache, and autograd refuses a graph on a tensor whose other rows are
            # written later.
            return record(velocity, x.clone(), sigma, self.gated[node])

        graph, keep = self.recompute.record(self.remaining, forward, x.device)
        v, v_neg = velocity.branches(x, sigma, replayed=True) if graph is None else (graph.v.detach(), None)
        if keep and graph is not None:
            self.kept[node] = graph
        if RngState.capture(x.device) != before:
            self.rng[node] = before
        self.remaining -= 1
        return v, v_neg


def rollout_with_graph(velocity: GuidedVelocity, noise: Tensor, sigmas: Tensor, solver: Solver = "euler") -> Tensor:
    """x_N [B, *S] with the autograd graph of the solver's whole chain: every Jacobian chained, memory grows with N.

    The ground truth that surrogates are judged by, affordable for small models only.
    """
    x, velocities, levels = noise, [], sigmas.to(noise.device)
    for n, row in enumerate(solver_table(sigmas.double().cpu().numpy(), solver)):
        velocities.append(velocity(x, levels[n]).to(x.dtype))
        x = x + sum(float(row[i]) * velocities[i] for i in row.nonzero()[0])
    return x
