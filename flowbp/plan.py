"""A surrogate plan: one point of the design space of reward backpropagation, as a flat table of numbers.

A rollout visits latents x_0 ... x_N at noise levels sigma_0 > ... > sigma_N = 0 with velocities v_0 ... v_{N-1}. A plan
says how a reward gradient travels back through the *cached* rollout without the chain of Jacobians. Its four axes (Wang
et al. 2026, arXiv 2606.11075):

    reward-model input   the sampled image x_N, or the posterior mean x_e - sigma_e v_e of an earlier node
    active set           the nodes that are re-forwarded with gradient: those whose gradient weight is not zero
    integration weights  `weights` give the surrogate its value, `grad_weights` scale each active node's VJP
    bridge coupling      at most one node j whose network input also carries gradient, through a gate alpha

A method draws a plan from the noise levels and a random generator; `flowbp.surrogate` runs any plan. NumPy and torch
are not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Bridge", "Leaps", "Node", "PlanBatch", "PosteriorMean", "Replay", "Similarity", "SurrogatePlan"]


Node = int | tuple[int, ...]  # one for the whole batch, or one a sample
Number = float | tuple[float, ...]


@dataclass(frozen=True)
class Bridge:
    """Two quadratures joined at `node` j: the latent x_j that the first one predicts is fed again to the network.

    alpha in [0, 1] scales the gradient that enters the network's input at j, never a value. alpha = 0 cuts that path
    (no input gradient is computed), alpha = 1 keeps it whole. The identity path into x_j is never damped.
    """

    node: int
    alpha: float

    def __post_init__(self):
        if not 0.0 <= self.alpha <= 1.0:  # also refuses NaN
            raise ValueError(
                f"bridge alpha must lie in [0, 1], got {self.alpha}: 0 cuts the cross-node path, 1 keeps it whole"
            )


@dataclass(frozen=True)
class PosteriorMean:
    """Reward-model input x_at - sigma_at v_at, the network's one-step prediction of the clean sample at node `at`."""

    at: Node


@dataclass(frozen=True)
class Similarity:
    """Per-sample weight 1 / (max(d_j, tau) + max(d_0, tau)) from the residuals of the plan's two quadratures
    (LeapAlign, FlowBP-Lagrange).

    Samples whose raw residual exceeds `max_dj` or `max_d0` are dropped from the loss (None keeps all).
    """

    tau: float
    max_dj: float | None = None
    max_d0: float | None = None

    def __post_init__(self):
        if not self.tau > 0:
            raise ValueError(f"similarity tau must be positive, got {self.tau}: it is the floor under each residual")
        for name in ("max_dj", "max_d0"):
            if (largest := getattr(self, name)) is not None and not largest > 0:
                raise ValueError(
                    f"similarity {name} must be positive, got {largest}: samples beyond it are dropped; None keeps all"
                )


class Replay(NamedTuple):
    """One forward pass of the sweep, with gradient. Node, weight and gate: one for the whole batch, or one a sample.

    node    whose latent the network is fed; re-noised copy m is filed under N + 1 + m, past the sample's N
    weight  of its VJP
    gate    alpha where gradient enters the network's input (an active bridge), 0 elsewhere
    output  the block of the reward input it feeds: 0 the sample, m + 1 copy m
    """

    node: Node
    weight: Number
    gate: Number = 0.0
    output: int = 0

    @property
    def gated(self) -> bool:
        """Whether any sample's gate is open here."""
        return any(self.gate) if isinstance(self.gate, tuple) else self.gate > 0


class Leaps(NamedTuple):
    """The two quadratures that a bridge joins: from x_start to x_joint by the weights `first` of `nodes`, and on to x_N
    by `second`.

    nodes, first, second: K entries, each one for the whole batch or one a sample; a weight of 0 skips.
    """

    start: Node
    joint: Node
    nodes: tuple[Node, ...]
    first: tuple[Number, ...]
    second: tuple[Number, ...]


@dataclass(frozen=True)
class SurrogatePlan:
    """Nodes and weights of a surrogate backward trajectory. All sequences run from the noise end to the clean end.

    nodes         indices into the rollout, strictly increasing: active nodes and the supports of the quadrature
    weights       value weights, signed, in sigma units: x_hat = x_start + sum_k weights[k] v_{nodes[k]} approximates
    the reward input
    grad_weights  weight of each node's VJP (rescaling and damping folded in); 0 means the node is only read from the
    cache
    start         the latent that the quadrature starts from
    reward_input  None: the sampled image x_N, value exact and gradient the surrogate's (straight-through); or a
    PosteriorMean
    bridge        the node where the quadrature is split in two, with its gradient gate
    similarity    how residuals weigh the samples; None weighs them equally
    num_renoised  extra copies of the sample, re-noised to the last noise level and denoised in one step (DRaFT-LV)

    Its gradient, with g = dR/dx_hat and every node input detached:

        dR/dtheta = sum_i grad_weights_i (dv_i/dtheta)^T c_i
        c_i = g                                          i >= j, or no bridge
        c_i = g + alpha grad_weights_j (dv_j/dx)^T g     i <  j
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    grad_weights: tuple[float, ...]
    start: int = 0
    reward_input: PosteriorMean | None = None
    bridge: Bridge | None = None
    similarity: Similarity | None = None
    num_renoised: int = 0

    def __post_init__(self):
        for name in (
            "nodes",
            "weights",
            "grad_weights",
        ):  # accept any sequence, NumPy scalars included; store hashable Python numbers
            convert = int if name == "nodes" else float
            object.__setattr__(self, name, tuple(convert(value) for value in getattr(self, name)))
        sizes = (len(self.nodes), len(self.weights), len(self.grad_weights))
        if len(set(sizes)) != 1 or not self.nodes:
            raise ValueError(
                f"a plan needs as many weights and grad_weights as nodes, and at least one node; got {sizes}"
            )
        if any(a >= b for a, b in zip(self.nodes, self.nodes[1:], strict=False)) or self.nodes[0] < 0:
            raise ValueError(
                f"plan nodes must be non-negative and strictly increasing, got {self.nodes}: sort them, drop repeats"
            )
        for name in ("weights", "grad_weights"):
            if not all(map(math.isfinite, getattr(self, name))):
                raise ValueError(f"plan {name} must be finite, got {getattr(self, name)}")
        if not self.active:
            raise ValueError(
                f"no node of {self.nodes} has a gradient weight: give at least one node a non-zero grad_weight"
            )
        if not 0 <= self.start <= self.nodes[0]:
            raise ValueError(
                f"plan start must lie in [0, {self.nodes[0]}], at or before the first node, got {self.start}"
            )
        if self.bridge is not None and self.bridge.node not in self.nodes:
            raise ValueError(f"bridge node {self.bridge.node} must be a node of the plan; its nodes are {self.nodes}")
        if self.reward_input is not None and self.reward_input.at != self.nodes[-1]:
            raise ValueError(
                f"the posterior mean must be taken at the plan's last node {self.nodes[-1]}, got {self.reward_input.at}"
            )
        if self.similarity is not None and self.bridge is None:
            raise ValueError(
                "similarity weights compare two joined quadratures: give the plan a bridge, or similarity=None"
            )
        if self.num_renoised < 0:
            raise ValueError(f"num_renoised must be 0 or more, got {self.num_renoised}")

    @property
    def active(self) -> tuple[tuple[int, float], ...]:
        """(node, gradient weight) of the active set, noise end first."""
        return tuple((i, w) for i, w in zip(self.nodes, self.grad_weights, strict=True) if w != 0.0)

    @property
    def active_bridge(self) -> Bridge | None:
        """The bridge if any gradient crosses it: its gate is open, its node is active, and an earlier active node
        receives it.
        """
        active = dict(self.active)
        crosses = (
            self.bridge and self.bridge.alpha > 0 and self.bridge.node in active and min(active) < self.bridge.node
        )
        return self.bridge if crosses else None

    @property
    def sweep(self) -> tuple[Replay, ...]:
        """The active nodes, then the re-noised copies, as the backward pass reads them: from the last to the first."""
        bridge, num_steps = self.active_bridge, self.nodes[-1] + 1
        nodes = (Replay(i, w, bridge.alpha if bridge and i == bridge.node else 0.0) for i, w in self.active)
        return (
            *nodes,
            *(Replay(num_steps + 1 + m, self.grad_weights[-1], output=m + 1) for m in range(self.num_renoised)),
        )

    @property
    def leaps(self) -> Leaps:
        """The plan's quadrature, split at its bridge. ValueError without one."""
        if self.bridge is None:
            raise ValueError(
                "a plan without a bridge has one quadrature, not two leaps: give it a bridge, or do not ask for its "
                "residuals"
            )
        j, rule = self.bridge.node, tuple(zip(self.nodes, self.weights, strict=True))
        first, second = (tuple(w if (i < j) == before else 0.0 for i, w in rule) for before in (True, False))
        return Leaps(self.start, j, self.nodes, first, second)

    def num_steps(self, total: int) -> int:
        """Network steps that the rollout must take: all `total`, or up to the node of the posterior mean."""
        return total if self.reward_input is None else self.reward_input.at + 1  # pyright: ignore[reportOperatorIssue]

    @property
    def cached_latents(self) -> frozenset[int]:
        """Nodes whose latent the sweep, the reward input or the residuals read (x_N is always kept)."""
        read: set[Any] = {replay.node for replay in self.sweep}
        if self.reward_input is not None:
            read.add(self.reward_input.at)
        if self.similarity is not None and self.bridge is not None:
            read |= {self.start, self.bridge.node}
        return frozenset(read)

    @property
    def cached_velocities(self) -> frozenset[int]:
        """Nodes whose velocity the reward input or the residuals read."""
        read: set[Any] = {replay.node for replay in self.sweep if replay.output}
        if self.reward_input is not None:
            read.add(self.reward_input.at)
        if self.similarity is not None:
            read |= set(self.nodes)
        return frozenset(read)

    def check(self, total: int) -> None:
        """Raise ValueError unless every index exists in a rollout of `total` steps."""
        if self.nodes[-1] >= total:
            raise ValueError(
                f"plan node {self.nodes[-1]} lies outside a rollout of {total} steps: nodes run from 0 to {total - 1}"
            )
        if self.num_renoised and self.nodes[-1] != total - 1:
            raise ValueError(
                f"re-noised copies are denoised from the last node {total - 1}, but the plan ends at {self.nodes[-1]}"
            )


@dataclass(frozen=True)
class PlanBatch:
    """One plan a sample, from one method: what `flowbp.surrogate` sweeps is a table [K, B] instead of [K].

    Sample b's last active node is replayed with every other sample's last, and so on towards the noise end. A sample
    with fewer active nodes than the largest (or than `num_active`, for ranks that share a batch) sits out the last
    replays with weight 0. Raises ValueError when the plans differ in what one batch cannot mix: the kind of reward
    input, the number of copies, or the similarity.
    """

    plans: tuple[SurrogatePlan, ...]
    num_active: int = 0

    def __post_init__(self):
        object.__setattr__(self, "plans", tuple(self.plans))
        if not self.plans:
            raise ValueError("a batch of plans needs at least one plan")
        most = max(len(plan.active) for plan in self.plans)
        object.__setattr__(self, "num_active", max(self.num_active, most))
        kinds = {
            "reward_input": {plan.reward_input is None for plan in self.plans},
            "num_renoised": {plan.num_renoised for plan in self.plans},
            "similarity": {plan.similarity for plan in self.plans},
        }
        for name, kind in kinds.items():
            if len(kind) > 1:
                raise ValueError(
                    f"the plans of a batch must agree in {name}: draw all of them from one method, got {kind}"
                )
        if self.similarity is not None and self.reward_input is not None and isinstance(self.reward_input.at, tuple):
            raise ValueError(
                "the plans of a batch with similarity must see posterior means of one node: their residuals end at one "
                "latent"
            )

    def rows(self, part: slice) -> PlanBatch:
        """The plans of a part of the batch, with as many replays as the whole."""
        return PlanBatch(self.plans[part], self.num_active)

    @property
    def sweep(self) -> tuple[Replay, ...]:
        """As SurrogatePlan.sweep, each entry one for the batch where all samples agree, else one a sample."""
        idle = [(Replay(plan.sweep[0].node, 0.0),) * (self.num_active - len(plan.active)) for plan in self.plans]
        columns = [wait + plan.sweep for wait, plan in zip(idle, self.plans, strict=True)]
        return tuple(
            Replay(*(_shared(replay[k] for replay in row) for k in range(3)), output=row[0].output)
            for row in zip(*columns, strict=True)
        )

    @property
    def reward_input(self) -> PosteriorMean | None:
        first = self.plans[0].reward_input
        return first and PosteriorMean(_shared(plan.reward_input and plan.reward_input.at for plan in self.plans))

    @property
    def similarity(self) -> Similarity | None:
        return self.plans[0].similarity

    @property
    def num_renoised(self) -> int:
        return self.plans[0].num_renoised

    @property
    def leaps(self) -> Leaps:
        leaps = [plan.leaps for plan in self.plans]
        longest = max(len(leap.nodes) for leap in leaps)
        tables = []
        for name, filler in (("nodes", None), ("first", 0.0), ("second", 0.0)):
            columns = [
                getattr(leap, name) + (leap.nodes[0] if filler is None else filler,) * (longest - len(leap.nodes))
                for leap in leaps
            ]
            tables.append(tuple(zip(*columns, strict=True)))
        return Leaps(_shared(leap.start for leap in leaps), _shared(leap.joint for leap in leaps), *tables)

    def num_steps(self, total: int) -> int:
        return max(plan.num_steps(total) for plan in self.plans)

    @property
    def cached_latents(self) -> frozenset[int]:
        return frozenset().union(*(plan.cached_latents for plan in self.plans))

    @property
    def cached_velocities(self) -> frozenset[int]:
        return frozenset().union(*(plan.cached_velocities for plan in self.plans))

    def check(self, total: int) -> None:
        for plan in self.plans:
            plan.check(total)


def _shared(values: Iterable) -> Any:
    """The value that all samples share, or the tuple of theirs."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values
