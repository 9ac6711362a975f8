"""The ops as Triton kernels, one file an op: a kernel that reads as its formula, and a launcher of the op's name.

A launcher takes and returns tensors of one device. flowbp_kernels checks them first, and imports this package at the
first launch.

A kernel reads the tables of its rule from the device's memory: nodes [K, C] int64 and weights [K, C] float64, with one
column for all samples or one a sample. It reads them in groups of 8 rows, which puts as many loads in flight as
registers hold, and lets one binary serve any number of nodes. A table that lies on the CPU travels by value: `carry`
writes its numbers to the device from the arguments of a launch. So no launch waits for the host or reads memory that
the host may have changed since, and a CUDA graph captures the numbers with the launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of every launch. No fusion: where a product and a sum are rounded once the source says tl.fma, as in csrc/.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

CARRIED = 64  # numbers that one launch carries


def carry(device: torch.device, nodes: Tensor | None, *weights: Tensor) -> list[Tensor | None]:
    """Tables of the CPU, int64 and float64, on the device: weights are rounded to float32, nodes must be below 2**24.

    A node travels as a float, because Triton never compiles anew for the value of a float. For an integer argument that
    is 1 or a multiple of 16 it does, inside a tuple even against do_not_specialize (3.9).
    """
    tables = weights if nodes is None else (nodes, *weights)
    integers = 0 if nodes is None else nodes.numel()
    numbers = [float(number) for table in tables for number in table.flatten().tolist()]
    words = torch.empty(len(numbers), dtype=torch.int64, device=device)
    with torch.cuda.device_of(words):
        for first in range(0, len(numbers), CARRIED):
            some = numbers[first : first + CARRIED]
            padded = *some, *[0.0] * (CARRIED - len(some))
            write[(1,)](words[first:], padded, len(some), integers - first, **OPTIONS)
    places = words.split([table.numel() for table in tables])
    carried: list[Tensor | None] = [
        place.view(table.dtype).view(table.shape) for place, table in zip(places, tables, strict=True)
    ]
    return carried if nodes is not None else [None, *carried]


@triton.jit(do_not_specialize=["count", "integers"])
def write(words, numbers, count, integers):
    """words[k] = numbers[k] for k < count: the first `integers` as int64, the others as the bits of float64."""
    for k in tl.static_range(len(numbers)):
        number = tl.cast(numbers[k], tl.float32)
        word = tl.where(k < integers, number.to(tl.int64), number.to(tl.float64).to(tl.int64, bitcast=True))
        tl.store(words + k, word, k < count)


def runs(x: Tensor, *tables: Tensor, apart: bool = False) -> tuple[int, int]:
    """(count, size) of x [B, *S]: B runs of one sample's elements, or, where nothing differs between samples, one run
    of the whole batch, of which more loads are aligned.

    apart: samples differ in more than the tables.
    """
    count = len(x) if apart or any(table.shape[1] > 1 for table in tables) else 1
    return count, x.numel() // count


def grid(count: int, size: int, block: int) -> tuple[int]:
    return (count * -(-size // block),)


def loadable(cache: Tensor) -> Tensor:
    """The cache as the kernels load it: float8 e4m3 as bytes, which the kernels decode, because Triton has no such type
    on sm_80.
    """
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def block_of(cache: Tensor) -> int:
    """Elements of one program. With 4 warps that is one 16-byte load for each thread and row, two for float32."""
    return 2048 if cache.element_size() == 1 else 1024
