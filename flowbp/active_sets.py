"""Random active nodes of a plan, and random pairs (k, j) that split a trajectory in two, from a NumPy generator.

Nodes count from the noise end: node i is the i-th network call of a rollout of N steps. The published methods count
from the clean end, with the reverse index N - i (1 is the last step). Pair samplers take their bounds as reverse
indices, because the papers give them so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from flowbp.plan import check_range

T = TypeVar("T")
POOL = 8  # draws a stratum


def train_window(num_steps: int, tail_ratio: float, min_length: int = 1) -> tuple[int, int]:
    """Steps [start, num_steps) that may carry gradient: the last ceil(num_steps tail_ratio), at least `min_length`."""
    if not 0.0 < tail_ratio <= 1.0:
        raise ValueError(f"tail_ratio must lie in (0, 1], got {tail_ratio}: 1 trains on the whole trajectory")
    if num_steps < min_length:
        raise ValueError(f"this method needs a rollout of at least {min_length} steps, got {num_steps}")
    return num_steps - max(min_length, math.ceil(num_steps * tail_ratio)), num_steps


def check_count(num_active: int, available: int) -> None:
    """ValueError unless `num_active` nodes can be drawn from a window of `available` steps."""
    way_out = "draw no more than the train window has steps, or raise the number of rollout steps or tail_ratio"
    check_range("num_active", num_active, 1, available, way_out)


def is_active(num_steps: int, active: Sequence[int]) -> np.ndarray:
    """[num_steps] bool: which nodes of a rollout are in the active set. Raises ValueError for one that is no node."""
    if outside := [int(i) for i in active if not 0 <= i < num_steps]:
        raise ValueError(f"active nodes must lie in [0, {num_steps - 1}], got {outside}")
    return np.isin(np.arange(num_steps), active)


def late_biased(
    nodes: Sequence[int], num_active: int, bias: float, rng: np.random.Generator, first_weight: int = 1
) -> tuple[int, ...]:
    """`num_active` of the consecutive `nodes`, in increasing order, drawn without replacement with probability
    ~ (offset + first_weight)^bias. Bias 0 is uniform; a larger bias favours the clean end.
    """
    check_count(num_active, len(nodes))
    mass = (np.arange(len(nodes)) + float(first_weight)) ** bias
    drawn = rng.choice(len(nodes), size=num_active, replace=False, p=mass / mass.sum())
    return tuple(sorted(int(nodes[i]) for i in drawn))


def stratified(
    nodes: Sequence[int], num_active: int, rng: np.random.Generator
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(nodes, inclusion probability of each): one node drawn uniformly from each of `num_active` consecutive strata of
    nearly equal size.

    Where a node's weight is divided by its probability, the sum over the drawn nodes is an unbiased estimate of the sum
    over all nodes.
    """
    check_count(num_active, len(nodes))
    strata = np.array_split(np.asarray(nodes), num_active)
    return tuple(int(rng.choice(stratum)) for stratum in strata), tuple(1.0 / len(stratum) for stratum in strata)


def stratified_draws(
    draw: Callable[[np.random.Generator], T], count: int, position: Callable[[T], float], rng: np.random.Generator
) -> list[T]:
    """`count` draws in random order, each distributed as `draw(rng)` alone, that together cover the range of `position`
    evenly.

    Systematic sampling: count * POOL independent draws are sorted by position, and from a random offset on every
    POOL-th is taken. All draws are equally likely to be taken, so the mean over those taken is an unbiased estimate.
    They cannot clump, because each is from a stratum of its own.
    """
    drawn = sorted((draw(rng) for _ in range(count * POOL)), key=position)
    chosen = drawn[int(rng.integers(POOL)) :: POOL]
    return [chosen[i] for i in rng.permutation(count)]


def equally_spaced(length: int, num_active: int, rng: np.random.Generator) -> tuple[int, ...]:
    """`num_active` of the first `length` nodes, length // num_active apart, from a random start; all nodes if there are
    no more than that.
    """
    if num_active >= length:
        return tuple(range(length))
    stride = length // num_active
    start = int(rng.integers(0, length - (num_active - 1) * stride))
    return tuple(start + i * stride for i in range(num_active))


def bridge_allocation(num_active: int, pre_length: int, post_length: int) -> tuple[int, int]:
    """How many of `num_active` nodes lie before the bridge, and how many from the bridge on: in proportion to the
    lengths of the two sides, and at least one each.
    """
    length = pre_length + post_length
    if not 2 <= num_active <= length:
        raise ValueError(f"a bridge needs num_active in [2, {length}] (one node on each side), got {num_active}")
    fewest, most = max(1, num_active - post_length), min(pre_length, num_active - 1)
    pre = min(max(round(num_active * pre_length / length), fewest), most)
    return pre, num_active - pre


class PairSampler(Protocol):
    """Draws nodes (k, j), k < j, inside the train window [start, num_steps)."""

    def __call__(self, num_steps: int, start: int, rng: np.random.Generator) -> tuple[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A pair's reverse indices lie in [min_rev, max_rev) and in the train window; max_rev = None: in the window."""

    min_rev: int = 1
    max_rev: int | None = None


@dataclass(frozen=True)
class UniformPair(Bounds):
    """Two distinct reverse indices drawn from [min_rev, max_rev); the larger is k. With max_j_rev, j is drawn first,
    from the reverse indices up to max_j_rev, and then k from those beyond j.
    """

    max_j_rev: int | None = None

    def __call__(self, num_steps, start, rng):
        (lo, hi), last = reverse_bounds(self, num_steps, start, fewest=2), self.max_j_rev
        if last is None:
            k_rev, j_rev = sorted(rng.choice(np.arange(lo, hi), size=2, replace=False), reverse=True)
        elif last < lo:
            raise ValueError(f"max_j_rev must be at least {lo}, the first reverse index open to j, got {last}")
        else:
            j_rev = rng.integers(lo, min(last, hi - 2) + 1)
            k_rev = rng.integers(j_rev + 1, hi)
        return int(num_steps - k_rev), int(num_steps - j_rev)


@dataclass(frozen=True)
class DirichletPair(Bounds):
    """The window cut into three lengths (clean end | j ... k | noise end) by a Dirichlet draw, each of at least a step.

    max_j_rev caps the length at the clean end. The overflow goes to the noise end, which keeps the gap between k and j.
    """

    alpha: tuple[float, float, float] = (2.5, 6.0, 2.0)
    max_j_rev: int | None = None

    def __post_init__(self):
        if len(self.alpha) != 3 or not all(a > 0 for a in self.alpha):
            raise ValueError(f"dirichlet alpha must be three positive numbers (clean, middle, noise), got {self.alpha}")

    def __call__(self, num_steps, start, rng):
        lo, hi = reverse_bounds(self, num_steps, start, fewest=3)
        proportions = rng.dirichlet(self.alpha)
        lengths = np.round(proportions * (hi - lo)).astype(int)
        lengths[np.argmax(proportions)] += hi - lo - lengths.sum()
        lengths = np.maximum(lengths, 1)
        lengths[np.argmax(lengths)] += hi - lo - lengths.sum()
        clean, between, _ = (int(length) for length in lengths)
        if self.max_j_rev is not None:
            clean = min(clean, max(1, self.max_j_rev - lo))
        return num_steps - lo - clean - between, num_steps - lo - clean


@dataclass(frozen=True)
class MidpointPair(Bounds):
    """k drawn uniformly in the window, j halfway between k and the clean end."""

    def __call__(self, num_steps, start, rng):
        lo, hi = reverse_bounds(self, num_steps, start, fewest=2)
        k = int(num_steps - rng.integers(lo + 1, hi))
        return k, max((k + num_steps) // 2, k + 1)


@dataclass(frozen=True)
class MidpointJPair(Bounds):
    """j drawn uniformly in the window, k halfway between the rollout's noise end and j. The window does not bound k."""

    def __call__(self, num_steps, start, rng):
        lo, hi = reverse_bounds(self, num_steps, start, fewest=2)
        j = int(num_steps - rng.integers(lo, hi - 1))
        return j // 2, j


def reverse_bounds(pairs: Bounds, num_steps: int, start: int, fewest: int) -> tuple[int, int]:
    """Reverse indices [lo, hi) open to a pair sampler. Raises ValueError when fewer than `fewest` are left."""
    lo, hi = max(pairs.min_rev, 1), num_steps - start + 1
    hi = hi if pairs.max_rev is None else min(pairs.max_rev, hi)
    if hi - lo < fewest:
        bounds = f"min_rev = {pairs.min_rev}, max_rev = {pairs.max_rev} and a window of {num_steps - start} steps"
        needs = f"{type(pairs).__name__} needs at least {fewest} reverse indices"
        raise ValueError(f"{needs}, but {bounds} leave [{lo}, {hi}): widen them")
    return lo, hi


PAIR_SAMPLERS: dict[str, type] = {
    "uniform": UniformPair,
    "dirichlet": DirichletPair,
    "midpoint": MidpointPair,
    "midpoint_j": MidpointJPair,
}
