"""A surrogate plan: one point of the design space of reward backpropagation, as a flat table of numbers.

A rollout visits latents x_0 ... x_N at noise levels sigma_0 > ... > sigma_N = 0 with velocities v_0 ... v_{N-1}. A plan
says how a reward gradient travels back through the *cached* rollout without the chain of Jacobians. Its four axes (Wang
et al. 2026, arXiv 2606.11075):

    reward-model input   the sampled image x_N, or the posterior mean x_e - sigma_e v_e of an earlier node
    active set           the nodes that are re-forwarded with gradient: those whose gradient weight is not zero
    integration weights  `weights` give the surrogate its value, `grad_weights` scale each active node's VJP
    bridge coupling      at most one node j whose network input also carries gradient, through a gate alpha

A method draws a plan from the noise levels and a random generator. `flowbp.surrogate` runs any plan. This module needs
neither NumPy nor torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, order=True)
class Copy:
    """Number of a re-noised copy of the sample, from 0. It takes the place of a node's index."""

    index: int


Place = int | Copy  # one latent of a trajectory: x_i of the rollout, or a copy
# Of the whole batch, or a tuple of one a sample: type checkers cannot know which of the two a plan holds.
Node = Any  # Place | tuple[int, ...]
Number = Any  # float | tuple[float, ...]


def in_order(places: Iterable[Place]) -> list[Place]:
    """Nodes from the noise end to the clean end, then the copies."""
    return sorted(places, key=lambda place: (isinstance(place, Copy), place))


def check_range(what: str, value: float, low: float, high: float, way_out: str) -> None:
    """ValueError unless low <= value <= high."""
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{what} must lie in [{low}, {high}], got {value}: {way_out}")


@dataclass(frozen=True)
class Bridge:
    """Two quadratures joined at `node` j. The first one ends at the latent x_j; the network reads x_j, and the second
    one goes on from there.

    alpha in [0, 1] scales the gradient that enters the network's input at j, never a value. alpha = 0 cuts that path
    (no input gradient is computed), alpha = 1 keeps it whole. The identity path into x_j is never damped.
    """

    node: int
    alpha: float

    def __post_init__(self):
        check_range("bridge alpha", self.alpha, 0, 1, "0 cuts the cross-node path, 1 keeps it whole")


@dataclass(frozen=True)
class PosteriorMean:
    """Reward-model input x_at - sigma_at v_at, the network's one-step prediction of the clean sample at node `at`."""

    at: Node


@dataclass(frozen=True)
class Similarity:
    """Per-sample weight 1 / (max(d_j, tau) + max(d_0, tau)) from the residuals d_j and d_0 of the plan's two
    quadratures (LeapAlign, FlowBP-Lagrange).

    Samples whose residual exceeds `max_dj` or `max_d0` are dropped from the loss (None keeps all).
    """

    tau: float
    max_dj: float | None = None
    max_d0: float | None = None

    def __post_init__(self):
        for name in ("tau", "max_dj", "max_d0"):
            if (residual := getattr(self, name)) is not None and not residual > 0:
                raise ValueError(f"similarity {name} must be positive, got {residual}; max_dj and max_d0 may be None")


class Replay(NamedTuple):
    """One forward pass of the sweep, with gradient. Node, weight and gate: one for the whole batch, or one a sample.

    node    the latent that the network is fed: that of a node, or of a re-noised copy of the sample
    weight  factor of the VJP
    gate    alpha where gradient enters the network's input (an active bridge), 0 elsewhere
    output  the block of the reward input that the velocity contributes to: 0 the sample, m + 1 copy m
    share   factor on what comes back through the bridge: the velocity's weight in x_j, over its weight in x_N
    """

    node: Node
    weight: Number
    gate: Number = 0.0
    output: int = 0
    share: Number = 1.0

    @property
    def gated(self) -> bool:
        """Whether any sample's gate is open here."""
        return any(self.gate) if isinstance(self.gate, tuple) else self.gate > 0


class Leaps(NamedTuple):
    """The two quadratures that a bridge joins, both on `nodes`: from x_start to x_joint with the weights `first`, from
    x_joint to x_N with the weights `second`.

    nodes, first, second: K entries, each one for the whole batch or one a sample; a weight of 0 skips the node.
    """

    start: Node
    joint: Node
    nodes: tuple[Node, ...]
    first: tuple[Number, ...]
    second: tuple[Number, ...]

    def padded(self, length: int) -> "Leaps":
        """The same leaps of one sample on `length` nodes: the first node is repeated with weight 0."""
        idle = length - len(self.nodes)
        nodes, zeros = self.nodes + self.nodes[:1] * idle, (0.0,) * idle
        return self._replace(nodes=nodes, first=self.first + zeros, second=self.second + zeros)


@dataclass(frozen=True)
class SurrogatePlan:
    """Nodes and weights of a surrogate backward trajectory. All sequences run from the noise end to the clean end.

    nodes         indices into the rollout, strictly increasing: active nodes and the supports of the quadrature
    weights       value weights, signed, in sigma units; the reward input is approximated by
                  x_hat = x_start + sum_k weights[k] v_{nodes[k]}
    grad_weights  weight of each node's VJP (rescaling and damping folded in); a node of weight 0 is read from the cache
                  and not replayed
    start         the latent that the quadrature starts from
    reward_input  None: the sampled image x_N, with the surrogate's gradient (straight-through); or a PosteriorMean
    bridge        the node where the quadrature is split in two, with its gradient gate
    similarity    how residuals weigh the samples; None weighs them equally
    num_renoised  extra copies of the sample, re-noised to the last noise level and denoised in one step (DRaFT-LV)
    shares        of each velocity's weight in x_N, what it has in the bridge's latent x_j. None: all of it before j, as
                  with Euler. A multistep solver takes the velocities just before j into steps on both sides of it

    Gradient, with g = dR/dx_hat and every network input detached:

        dR/dtheta = sum_i grad_weights_i (dv_i/dtheta)^T c_i
        c_i = g                                                   i >= j, or no bridge
        c_i = g + alpha shares_i grad_weights_j (dv_j/dx)^T g     i <  j
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    grad_weights: tuple[float, ...]
    start: int = 0
    reward_input: PosteriorMean | None = None
    bridge: Bridge | None = None
    similarity: Similarity | None = None
    num_renoised: int = 0
    shares: tuple[float, ...] | None = None

    def __post_init__(self):
        # Any sequence is accepted, NumPy scalars included. Hashable Python numbers are stored.
        numbers = {"nodes": int, "weights": float, "grad_weights": float}
        if self.shares is not None:
            numbers["shares"] = float
        for name, number in numbers.items():
            object.__setattr__(self, name, tuple(map(number, getattr(self, name))))
        nodes, sizes = self.nodes, {name: len(getattr(self, name)) for name in numbers}
        if len(set(sizes.values())) != 1 or not nodes:
            raise ValueError(f"a plan needs at least one node, and as many weights of each kind as nodes; got {sizes}")
        if any(a >= b for a, b in zip(nodes, nodes[1:], strict=False)) or nodes[0] < 0:
            raise ValueError(f"nodes must be non-negative and strictly increasing, got {nodes}: sort them, each once")
        for name in tuple(numbers)[1:]:
            if not all(map(math.isfinite, getattr(self, name))):
                raise ValueError(f"plan {name} must be finite, got {getattr(self, name)}")
        if not self.active:
            raise ValueError(f"no node of {nodes} has a gradient weight: give at least one node a non-zero grad_weight")
        check_range("plan start", self.start, 0, nodes[0], "start at or before the first node")
        if self.bridge is not None and self.bridge.node not in nodes:
            raise ValueError(f"bridge node {self.bridge.node} must be a node of the plan; its nodes are {nodes}")
        if (seen := self.reward_input) is not None and seen.at != nodes[-1]:
            raise ValueError(f"the posterior mean must be taken at the plan's last node {nodes[-1]}, got {seen.at}")
        if self.similarity is not None and self.bridge is None:
            raise ValueError("similarity compares two joined quadratures: give the plan a bridge, or similarity=None")
        check_range("num_renoised", self.num_renoised, 0, 1000, "0 makes no copies")

    @property
    def active(self) -> tuple[tuple[int, float], ...]:
        """(node, gradient weight) of the active set, noise end first."""
        return tuple((i, w) for i, w in zip(self.nodes, self.grad_weights, strict=True) if w != 0.0)

    @property
    def active_bridge(self) -> Bridge | None:
        """The bridge if gradient crosses it, else None. Gradient crosses if the gate is open, the node is active, and
        an earlier active node receives the gradient.
        """
        bridge, active = self.bridge, dict(self.active)
        crosses = bridge and bridge.alpha > 0 and bridge.node in active and min(active) < bridge.node
        return bridge if crosses else None

    @property
    def replays(self) -> tuple[Replay, ...]:
        """The active nodes in rollout order, then the re-noised copies. The sweep takes them in reverse."""
        bridge = self.active_bridge
        gates = {bridge.node: bridge.alpha} if bridge else {}
        shares = dict(zip(self.nodes, self.shares, strict=True)) if bridge and self.shares else {}
        nodes = [Replay(i, weight, gates.get(i, 0.0), share=shares.get(i, 1.0)) for i, weight in self.active]
        copies = [Replay(Copy(m), self.grad_weights[-1], output=m + 1) for m in range(self.num_renoised)]
        return (*nodes, *copies)

    @property
    def leaps(self) -> Leaps:
        """The plan's quadrature, split at its bridge. Raises ValueError for a plan without a bridge."""
        if self.bridge is None:
            raise ValueError("a plan without a bridge has no two leaps: give it one, or do not ask for its residuals")
        j, rule = self.bridge.node, tuple(zip(self.nodes, self.weights, strict=True))
        first, second = (tuple(w if (i < j) == before else 0.0 for i, w in rule) for before in (True, False))
        return Leaps(self.start, j, self.nodes, first, second)

    def num_steps(self, total: int) -> int:
        """Network steps that the rollout must take: all `total`, or up to the node of the posterior mean."""
        return total if self.reward_input is None else self.reward_input.at + 1

    @property
    def cached_latents(self) -> frozenset[Place]:
        """Nodes and copies whose latent the sweep, the reward input or the residuals read (x_N is always kept)."""
        read = {replay.node for replay in self.replays}
        if self.reward_input is not None:
            read.add(self.reward_input.at)
        if self.similarity is not None and self.bridge is not None:
            read |= {self.start, self.bridge.node}
        return frozenset(read)

    @property
    def cached_velocities(self) -> frozenset[Place]:
        """Nodes and copies whose velocity the reward input or the residuals read."""
        read: set[Place] = set(map(Copy, range(self.num_renoised)))
        if self.reward_input is not None:
            read.add(self.reward_input.at)
        if self.similarity is not None:
            read |= set(self.nodes)
        return frozenset(read)

    def check(self, total: int, batch: int | None = None) -> None:
        """Raise ValueError unless every index exists in a rollout of `total` steps. One plan serves any `batch`."""
        if (last := self.nodes[-1]) >= total:
            raise ValueError(f"plan node {last} lies outside a rollout of {total} steps: nodes are 0 to {total - 1}")
        if self.num_renoised and last != total - 1:
            raise ValueError(f"re-noised copies start at the last node {total - 1}, but the plan ends at {last}")


@dataclass
class PlanBatch:
    """One plan a sample, all from one method: the table that `flowbp.surrogate` sweeps is [K, B] instead of [K].

    Replays are aligned at the clean end: pass k from the end holds each sample's k-th-last active node. Shorter plans
    are padded at the noise end with replays of weight 0, up to `num_active` or the longest plan, so that all samples,
    and all ranks that share a batch, run equally many passes. Raises ValueError when the plans differ in what one batch
    cannot mix: the kind of reward input, the number of copies, or the similarity.

    The other attributes are those of a SurrogatePlan. Each field of a replay is one value where all samples agree, else
    one a sample.
    """

    plans: tuple[SurrogatePlan, ...]
    num_active: int = 0

    def __post_init__(self):
        self.plans = tuple(self.plans)
        if not self.plans:
            raise ValueError("a batch of plans needs at least one plan")
        self.num_active = max(self.num_active, *(len(plan.active) for plan in self.plans))
        kinds = {
            "reward_input": {plan.reward_input is None for plan in self.plans},
            "num_renoised": {plan.num_renoised for plan in self.plans},
            "similarity": {plan.similarity for plan in self.plans},
        }
        for name, kind in kinds.items():
            if len(kind) > 1:
                raise ValueError(f"the plans of a batch must agree in {name}, got {kind}: draw all from one method")
        self.similarity, self.num_renoised = self.plans[0].similarity, self.plans[0].num_renoised
        seen = [plan.reward_input.at for plan in self.plans if plan.reward_input is not None]
        self.reward_input = PosteriorMean(_shared(seen)) if seen else None
        if self.similarity is not None and self.reward_input is not None and isinstance(self.reward_input.at, tuple):
            raise ValueError("plans with similarity must see posterior means of one node, where their residuals end")
        self.cached_latents = frozenset[Place]().union(*(plan.cached_latents for plan in self.plans))
        self.cached_velocities = frozenset[Place]().union(*(plan.cached_velocities for plan in self.plans))
        columns = []
        for plan in self.plans:
            idle = Replay(plan.replays[0].node, weight=0.0)
            columns.append((idle,) * (self.num_active - len(plan.active)) + plan.replays)
        self.replays = tuple(Replay(*map(_shared, zip(*row, strict=True))) for row in zip(*columns, strict=True))

    def rows(self, samples: slice) -> "PlanBatch":
        """The plans of some samples, padded to as many replays as the whole batch makes."""
        return PlanBatch(self.plans[samples], self.num_active)

    @property
    def leaps(self) -> Leaps:
        longest = max(len(plan.nodes) for plan in self.plans)
        start, joint, *tables = zip(*(plan.leaps.padded(longest) for plan in self.plans), strict=True)
        return Leaps(_shared(start), _shared(joint), *(tuple(zip(*columns, strict=True)) for columns in tables))

    def num_steps(self, total: int) -> int:
        return max(plan.num_steps(total) for plan in self.plans)

    def check(self, total: int, batch: int | None = None) -> None:
        """As SurrogatePlan.check, for every plan; and raise ValueError unless each sample of `batch` has one."""
        if batch not in (None, len(self.plans)):
            raise ValueError(f"{len(self.plans)} plans for a batch of {batch} samples: pass one plan, or one a sample")
        for plan in self.plans:
            plan.check(total)


Plan = SurrogatePlan | PlanBatch  # one for the batch, or one a sample


def _shared(values: Iterable) -> Any:
    """The value on which all samples agree, or else the tuple of their values."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values
