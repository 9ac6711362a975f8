"""What the kernels share: where a program works, and the loop over the rows of a rule."""

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(8)  # rows whose loads are in flight together


@triton.jit
def place(program, size, BLOCK: tl.constexpr):
    """(b, i, inside) of a program on a grid of samples x blocks, in 64 bits: its sample, its elements of that sample,
    and which of the elements exist.
    """
    blocks = tl.cast((size - 1) // BLOCK + 1, tl.int32)  # size + BLOCK - 1 may exceed 32 bits where size does not
    b = (program // blocks).to(tl.int64)
    i = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return b, i, i < size


@triton.jit
def entry(table, columns, k, b, exists):
    """table[k, b], or table[k, 0] if all samples share a column; 0 where k does not exist."""
    return tl.load(table + k.to(tl.int64) * columns + tl.where(columns > 1, b, 0), exists, 0)


@triton.jit
def add_rows(
    total, velocities, scales, nodes, node_columns, weights, weight_columns, num_nodes, num_cached, count, size, b, i,
    inside
):  # fmt: skip
    """total + sum_k weights[k] scales[nodes[k], b] velocities[nodes[k], b, i] in float32: one FMA a node, in the order
    given.

    A row of weight zero is not read. A node that is not in the cache makes the sum NaN, and nothing is read for it.
    """
    first = tl.full((), 0, tl.int32)
    while first < num_nodes:
        terms = ()
        for k in tl.static_range(GROUP):  # all before the rows are read: else each row would wait for its own node
            exists = first + k < num_nodes
            node = entry(nodes, node_columns, first + k, b, exists)
            node = tl.where((node >= 0) & (node < num_cached), node, -1).to(tl.int32)
            weight = entry(weights, weight_columns, first + k, b, exists).to(tl.float32)
            terms += ((node, weight),)
        for k in tl.static_range(GROUP):
            node, weight = terms[k]  # pyright: ignore[reportAssignmentType]
            takes_part, cached = weight != 0, node >= 0  # pyright: ignore[reportOperatorIssue]
            row = tl.maximum(node, 0).to(tl.int64) * count + b
            weight = tl.where(cached, weight, float("nan"))
            if scales is not None:
                weight *= tl.load(scales + row, takes_part & cached, 1)
            read = tl.where(takes_part & cached, inside, False)
            v = to_float32(tl.load(velocities + row * size + i, read, 0))
            total = tl.where(takes_part, tl.fma(v, weight, total), total)
        first += GROUP
    return total


@triton.jit
def to_float32(v):
    """A float as float32. A byte encodes a float8 e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinity.

    Shifted by 7, exponent and mantissa of the byte are those of a float16 that is 2**8 times smaller, subnormals
    included.
    """
    if v.dtype == tl.uint8:
        bits = v.to(tl.int16)
        small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), small.to(tl.float32) * 256)
    else:
        return v.to(tl.float32)
