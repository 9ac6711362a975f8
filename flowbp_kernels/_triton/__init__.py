"""The ops as Triton kernels, one file an op: a kernel that reads as its formula, and a launcher of the op's name.

A launcher takes and returns tensors of one device; flowbp_kernels checks them first, and imports this package at its first launch.

Nodes and weights travel by value, as tuples of float arguments of the launch. They lie in the constant bank beside the pointers, so no
launch waits for the host or reads memory that the host may have changed since, and a CUDA graph captures the numbers with the launch.
- A node travels as a float too (exact up to 2**24): Triton compiles anew for an integer argument that is 1 or a multiple of 16, inside a
  tuple even against do_not_specialize (3.9), and never for the value of a float.
- Loops over a rule are unrolled, so that the loads of its rows are in flight together: one binary for each number of nodes.
- A rule that the batch shares (tables [K, 1]) is one launch; rules of each sample (a table [K, B]) are one launch a sample.
- Rows of weight zero are dropped before the launch, and never read.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: the `samples` of the batch that it covers, as `count` runs of `size` elements, and its columns of the tables.

    batch: how many such runs lie between one node's row and the next one's.
    """

    samples: slice
    count: int
    size: int
    batch: int
    columns: list[tuple[float, ...]]

    def grid(self, block: int) -> tuple[int]:
        return (self.count * -(-self.size // block),)


def launches(x: Tensor, *tables: Tensor, apart: bool = False) -> Iterator[Launch]:
    """The launches over x [B, *S] that CPU tables [K, 1] or [K, B] need. apart: samples differ in more than the tables.

    Where nothing differs between samples the batch is one long run, which keeps more of its loads aligned.
    """
    batch, size = len(x), x[0].numel()
    tables = [table.float() for table in tables]  # a weight that underflows is zero from here on
    if any(table.shape[1] > 1 for table in tables):
        columns = [table.expand(-1, batch).T.tolist() for table in tables]
        for b in range(batch):
            yield Launch(slice(b, b + 1), 1, size, batch, [tuple(column[b]) for column in columns])
    else:
        count = batch if apart else 1
        yield Launch(slice(batch), count, x.numel() // count, count, [tuple(table[:, 0].tolist()) for table in tables])


def nonzero(nodes: tuple[float, ...], weights: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The nodes of nonzero weight, in the order given, and their weights."""
    kept = [pair for pair in zip(nodes, weights, strict=True) if pair[1] != 0]
    return tuple(node for node, _ in kept), tuple(weight for _, weight in kept)


def loadable(cache: Tensor) -> Tensor:
    """The cache as the kernels load it: float8 e4m3 as the bytes that they decode, for Triton has no such type on sm_80."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def block_of(cache: Tensor) -> int:
    """Elements a program: with 4 warps one 16-byte load a thread and row, two for float32."""
    return 2048 if cache.element_size() == 1 else 1024
