"""What the kernels that read a cache of velocities share: the loop over the rows of a rule."""

import triton
import triton.language as tl


@triton.jit
def place(size, BLOCK: tl.constexpr):
    """(b, i, inside) of a program on a grid of samples x blocks: its sample, its elements of that sample, which of them exist. 64-bit."""
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return b, i, i < size


@triton.jit
def add_rows(total, velocities, scales, nodes, weights, batch, size, b, i, inside):
    """total + sum_k weights[k] scales[nodes[k], b] velocities[nodes[k], b, i] in float32: one FMA a node, in the order given."""
    for k in tl.static_range(len(nodes)):
        row = tl.cast(nodes[k], tl.int64) * batch + b
        weight = tl.cast(weights[k], tl.float32)
        if scales is not None:
            weight *= tl.load(scales + row)
        v = to_float32(tl.load(velocities + row * size + i, inside))
        total = tl.fma(v, weight, total)
    return total


@triton.jit
def to_float32(v):
    """The float32 of a float; of a byte, that of the float8 e4m3 which it encodes (sign, 4 bits of exponent, 3 of mantissa; no infinity).

    Shifted by 7 its exponent and mantissa are those of a float16 that is 2**8 times smaller, subnormals included.
    """
    if v.dtype == tl.uint8:
        bits = v.to(tl.int16)
        small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), small.to(tl.float32) * 256)
    else:
        return v.to(tl.float32)
