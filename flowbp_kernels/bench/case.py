"""What a case of the benchmarks is: an op at one size, and every way to compute it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# One sample's latent, and what a block of a network reads: tokens, heads, and features of a head. The video is 21
# latent frames of 720 x 1280 pixels. The tokens of a block are those of 512 x 512, for FLUX with those of the prompt.
LATENTS = {
    "tiny": (3, 7, 41),  # odd, for tests and sanitizers; only where asked for
    "sd3.5-512": (16, 64, 64),
    "sd3.5-1024": (16, 128, 128),
    "flux-1024": (4096, 64),
    "video-720p": (16, 21, 90, 160),
    "sd3.5-block": (1024, 24, 64),
    "flux-block": (1536, 24, 128),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    op: str
    latent: str
    batch: int
    steps: int  # N: rows of the cache, all of which are read; 1 for an op of no cache or of few rows
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *LATENTS[self.latent])


@dataclass(frozen=True)
class Problem:
    """An op's inputs at hand, and every way to compute it.

    ours(*inputs): through flowbp_kernels, with gradient.
    ours_into(*inputs): the same into tensors made before, as a trainer does.
    baselines: other ways by name, of the same inputs.
    to_compile: the formula written for torch.compile, with float32 sums and no more casts than needed.
    leaves: positions of the inputs that backward differentiates; none for an op without gradient.
    traffic: bytes that must be read and written at least, by mode.
    """

    inputs: tuple[Tensor, ...]
    ours: Callable
    ours_into: Callable
    to_compile: Callable
    baselines: dict[str, Callable]
    leaves: tuple[int, ...]
    traffic: dict[str, int] = field(default_factory=dict)


def draw(case: Case, device: str, *rows: int) -> Tensor:
    return torch.randn(*rows, *case.shape, dtype=DTYPES[case.dtype], device=device)


def bytes_of(**tensors: Sequence[Tensor]) -> dict[str, int]:
    """Bytes by mode, from the tensors that each mode reads and writes; "full" is the sum."""
    return with_sum({mode: sum(tensor.nbytes for tensor in group) for mode, group in tensors.items()})


def with_sum(by_mode: dict[str, int]) -> dict[str, int]:
    return by_mode | ({"full": sum(by_mode.values())} if "backward" in by_mode else {})
