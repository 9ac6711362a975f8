"""Classifier-free guidance: turns a network's velocity into the guided velocity that the rollout and the sweep see.

    v = v_neg + scale (v_pos - v_neg)          scale > 1; otherwise v = v_pos alone

Whether the negative branch carries gradient is decided here. Detached (the default), v_neg is a constant for parameters
and input, so the VJP of v is scale times the VJP of v_pos, and a replay does not run the negative branch at all.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]  # named tensors, each [B, ...]
# (x [B, *S], sigma [] or [B], conditioning) -> velocity [B, *S]
NetworkVelocity = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Guidance:
    """How much guidance, and what its gradient is.

    scale             weight of the positive branch; 1 or less runs the positive branch alone
    detach_negative   the negative branch is a constant in the backward pass
    compensate        divide the gradient by `scale`, which otherwise multiplies it
    embedded          guidance scale that a guidance-distilled network takes as an input (FLUX.1-dev: 3.5); None for
                      every other network
    """

    scale: float = 1.0
    detach_negative: bool = True
    compensate: bool = False
    embedded: float | None = None

    def __post_init__(self):
        for name, value in (("scale", self.scale), ("embedded", self.embedded)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"guidance {name} must be a finite number of 0 or more, got {value}")

    @property
    def active(self) -> bool:
        return self.scale > 1.0

    @property
    def divisor(self) -> float:
        """What the loss is divided by before its backward pass."""
        return self.scale if self.compensate and self.active else 1.0


class GuidedVelocity:
    """The velocity of one batch under `guidance`, with its conditioning bound: (x [B, *S], sigma [] or [B]) -> [B, *S].

    batched: run the two branches in one network call, wherever both record a graph or neither does.
    """

    def __init__(
        self,
        network: NetworkVelocity,
        positive: Conditioning,
        negative: Conditioning | None,
        guidance: Guidance,
        batched: bool = True,
    ):
        if guidance.active and negative is None:
            raise ValueError(
                f"guidance scale {guidance.scale} needs the negative conditioning: encode the empty prompt, or set "
                "scale to 1"
            )
        self.network, self.positive, self.negative, self.guidance = network, positive, negative, guidance
        self.batched = batched
        if guidance.active and negative is not None and batched:
            self._both = {name: torch.cat([negative[name], positive[name]]) for name in positive}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        positive, negative = self.branches(x, sigma)
        return positive if negative is None else negative + self.guidance.scale * (positive - negative)

    def branches(self, x: Tensor, sigma: Tensor, replayed: bool = False) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg); v_neg is None without guidance, and records no graph when it is detached.

        replayed: `replay` will repeat this x and sigma. A detached v_neg then gets a network call of its own, so that
            v_pos draws the random numbers (dropout) that the replay draws.
        """
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
            return self.guidance.scale * self.network(x, sigma, self.positive)
        return self(x, sigma)

    def _repeated(self, copies: int) -> "GuidedVelocity":
        """The velocity of a batch that holds this one `copies` times."""

        def repeat(conditioning: Conditioning | None) -> Any:
            return conditioning and {name: torch.cat([value] * copies) for name, value in conditioning.items()}

        positive, negative = repeat(self.positive), repeat(self.negative)
        return GuidedVelocity(self.network, positive, negative, self.guidance, self.batched)
