"""Classifier-free guidance: turns a network's velocity into the guided velocity that the rollout and the sweep see.

    v = v_neg + scale (v_pos - v_neg)          scale > 1 and sigma in the interval; otherwise v = v_pos alone

Whether the negative branch carries gradient is decided here. Detached (the default), v_neg is a constant for parameters
and input, so the VJP of v is scale times the VJP of v_pos, and a replay does not run the negative branch at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config checks its guidance without torch, whose import takes longer than the check
    from torch import Tensor

Conditioning = Mapping[str, "Tensor"]  # named tensors, each [B, ...]
# (x [B, *S], sigma [] or [B], conditioning) -> velocity [B, *S]
NetworkVelocity = Callable[["Tensor", "Tensor", Conditioning], "Tensor"]


@dataclass(frozen=True)
class Guidance:
    """How much guidance, and what its gradient is.

    scale             weight of the positive branch; 1 or less runs the positive branch alone
    detach_negative   the negative branch is a constant in the backward pass
    compensate        divide the gradient by `scale`, which otherwise multiplies it
    embedded          guidance scale that a guidance-distilled network takes as an input (FLUX.1-dev: 3.5); None for
                      every other network
    interval          (low, high): the noise levels low <= sigma <= high are guided, the others take the positive branch
                      alone, at half the network's work (Kynkaanniemi et al. 2024, arXiv 2404.07724). None: all
    """

    scale: float = 1.0
    detach_negative: bool = True
    compensate: bool = False
    embedded: float | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        for name, value in (("scale", self.scale), ("embedded", self.embedded)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"guidance {name} must be a finite number of 0 or more, got {value}")
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low < high <= 1:
                raise ValueError(f"guidance interval must be two noise levels, 0 <= low < high <= 1, not {low}, {high}")
            if self.compensate:
                cause = "guidance.compensate divides every gradient by the scale, also those outside the interval"
                raise ValueError(f"{cause}: set compensate to false, or interval to null")

    @property
    def active(self) -> bool:
        return self.scale > 1.0

    def guides(self, level: float) -> bool:
        """Whether the velocity at a noise level has a negative branch."""
        return self.active and (self.interval is None or self.interval[0] <= level <= self.interval[1])

    def scale_at(self, sigma: Tensor) -> float | Tensor:
        """`scale`; with an interval, a float64 tensor shaped as sigma [] or [B] that is 1 at the levels outside."""
        if self.interval is None:
            return self.scale
        low, high = self.interval
        level = sigma.double()  # as `guides` compares; torch would round scale and bounds to float32
        return level.new_ones(level.shape).masked_fill((level >= low) & (level <= high), self.scale)

    @property
    def divisor(self) -> float:
        """What the loss is divided by before its backward pass."""
        return self.scale if self.compensate and self.active else 1.0


@dataclass(eq=False, repr=False)
class GuidedVelocity:
    """The velocity of one batch under `guidance`, with its conditioning bound: (x [B, *S], sigma [] or [B]) -> [B, *S],
    in x's dtype where it is guided, else in the network's.

    batched: run the two branches in one network call, wherever both record a graph or neither does.
    """

    network: NetworkVelocity
    positive: Conditioning
    negative: Conditioning | None
    guidance: Guidance
    batched: bool = True

    def __post_init__(self):
        import torch

        if not self.guidance.active:
            return
        if self.negative is None:
            needs = f"guidance scale {self.guidance.scale} needs the negative conditioning"
            raise ValueError(f"{needs}: encode the empty prompt, or set scale to 1")
        if self.batched:
            self._both = {name: torch.cat([self.negative[name], x]) for name, x in self.positive.items()}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        positive, negative = self.branches(x, sigma)
        if negative is None:
            return positive
        positive, negative = positive.to(x.dtype), negative.to(x.dtype)  # a bfloat16 sum would lose what guidance adds
        return negative + self._scale(x, sigma) * (positive - negative)

    def at(self, level: float) -> GuidedVelocity:
        """The velocity at one noise level: this one, or its positive branch alone where the level is not guided."""
        if not self.guidance.active or self.guidance.guides(level):
            return self
        return replace(self, negative=None, guidance=replace(self.guidance, scale=1.0, interval=None))

    def _scale(self, x: Tensor, sigma: Tensor) -> float | Tensor:
        """The guidance scale, as a factor of velocities like x."""
        scale = self.guidance.scale_at(sigma)
        return scale if isinstance(scale, float | int) else scale.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def branches(self, x: Tensor, sigma: Tensor, replayed: bool = False) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg); v_neg is None without guidance, and records no graph when it is detached.

        replayed: `replay` will repeat this x and sigma. A detached v_neg then gets a network call of its own, so that
            v_pos draws the random numbers (dropout) that the replay draws.
        """
        import torch

        if not self.guidance.active:
            return self.network(x, sigma, self.positive), None
        alone = self.guidance.detach_negative and (replayed or torch.is_grad_enabled())
        if self.batched and not alone:
            sigmas = torch.cat([sigma, sigma]) if sigma.dim() else sigma
            negative, positive = self.network(torch.cat([x, x]), sigmas, self._both).chunk(2)
            return positive, negative
        positive = self.network(x, sigma, self.positive)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.guidance.detach_negative):
            return positive, self.network(x, sigma, self.negative)  # pyright: ignore[reportArgumentType]

    def replay(self, x: Tensor, sigma: Tensor) -> Tensor:
        """A tensor with the guided velocity's VJP. Its value is not the velocity's when the negative branch is a
        constant.

        x may hold the batch at several nodes, [n B, *S] with sigma [n B].
        """
        copies = len(x) // len(next(iter(self.positive.values()))) if self.positive else 1
        if copies > 1:
            return self._repeated(copies).replay(x, sigma)
        if self.guidance.active and self.guidance.detach_negative:
            return self._scale(x, sigma) * self.network(x, sigma, self.positive).to(x.dtype)
        return self(x, sigma)

    def _repeated(self, copies: int) -> GuidedVelocity:
        """The velocity of a batch that holds this one `copies` times."""
        import torch

        both: Any = (self.positive, self.negative)
        positive, negative = (side and {name: torch.cat([x] * copies) for name, x in side.items()} for side in both)
        return replace(self, positive=positive, negative=negative)
