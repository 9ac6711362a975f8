"""modulated_layer_norm, modulated_rms_norm, gated_residual and gated_residual_layer_norm in Triton.

One kernel each for forward and backward. What an op does not have is None, and the compiler leaves it out. A program
takes some tokens of one sample, one after the other, a whole row in registers: what differs by sample is read once for
all of them, and one pass gives row statistics and result.

Tensors reach a kernel as (pointer, strides): [B, T, D] with those of sample and token, rows by sample with that of the
sample, 0 if one row serves all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS
from flowbp_kernels.modulation import CHUNK

TOKENS = 4  # of one program, unless it also sums over a chunk of them: each writes its sums once, in float32


@triton.jit
def place(tokens, CHUNK: tl.constexpr):
    """(sample, first token, end) of a program: one of each chunk of tokens of each sample, in this order."""
    chunks = (tokens - 1) // CHUNK + 1
    first = tl.program_id(0) % chunks * CHUNK
    return (tl.program_id(0) // chunks).to(tl.int64), first, tl.minimum(first + CHUNK, tokens)


@triton.jit
def load_row(view, b, i, inside):
    """Row b of [B or 1, D], in float32; zero outside."""
    return tl.load(view[0] + b * view[1] + i, inside, 0).to(tl.float32)


@triton.jit
def load(view, b, t, i, inside):
    """Token t of sample b of [B, T, D]; zero outside."""
    return tl.load(view[0] + b * view[1] + t * view[2] + i, inside, 0)


@triton.jit
def normalize(s, inside, size, eps, IS_LAYER: tl.constexpr):
    """(n, 1 / sqrt(variance + eps)) of a row whose elements outside are zero, and stay zero."""
    if IS_LAYER:
        s = tl.where(inside, s - tl.sum(s) / size, 0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(s * s) / size + eps))
    return s * rstd, rstd


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, gate, y, weight, shift, scale, shift_2, scale_2, total, out, out_2, eps, tokens, size, IS_LAYER: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s = x + gate y, as stored;  n = norm(s) weight;  out = n (1 + scale) + shift, and the same of scale_2, shift_2"""
    b, first, end = place(tokens, CHUNK)
    i = tl.arange(0, BLOCK)
    inside = i < size
    if gate is not None:
        gate_row = load_row(gate, b, i, inside)
    if weight is not None:
        weight_row = tl.load(weight + i, inside, 0).to(tl.float32)
    if scale is not None:
        factor = 1 + load_row(scale, b, i, inside)
    if shift is not None:
        term = load_row(shift, b, i, inside)
    if scale_2 is not None:
        factor_2, term_2 = 1 + load_row(scale_2, b, i, inside), load_row(shift_2, b, i, inside)
    for token in range(first, end):
        t = tl.cast(token, tl.int64)
        here = (b * tokens + t) * size + i
        s = load(x, b, t, i, inside)
        if gate is not None:
            s = tl.fma(gate_row, load(y, b, t, i, inside).to(tl.float32), s.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + here, s, inside)
        if out is not None:
            n, rstd = normalize(s.to(tl.float32), inside, size, eps, IS_LAYER)
            if weight is not None:
                n *= weight_row
            if out_2 is not None:
                tl.store(out_2 + here, tl.fma(n, factor_2, term_2).to(out_2.dtype.element_ty), inside)
            if shift is not None:
                n = tl.fma(n, factor, term)
            elif scale is not None:
                n *= factor
            tl.store(out + here, n.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    g_total, g, g_2, s, gate, y, weight, scale, scale_2, of_x, of_y, parts, eps, tokens, size, IS_LAYER: tl.constexpr,
    OF_MODULATION: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With u = weight (g (1 + scale) + g_2 (1 + scale_2)):

    of_x = d = g_total + rstd (u - mean u - n mean(u n)), without mean u for RMS;  of_y = gate d
    parts[:, program] = sums over the program's tokens of g n, g, g_2 n, g_2 (without g and g_2 for RMS) and d y
    """
    b, first, end = place(tokens, CHUNK)
    i = tl.arange(0, BLOCK)
    inside = i < size
    if scale is not None:
        factor = 1 + load_row(scale, b, i, inside)
    nothing = tl.zeros((BLOCK,), tl.float32)
    sum_gn, sum_g, sum_gn_2, sum_g_2, sum_dy = nothing, nothing, nothing, nothing, nothing
    for token in range(first, end):
        t = tl.cast(token, tl.int64)
        here = (b * tokens + t) * size + i
        # All loads of a token are in flight before a sum over the row waits for one of them.
        if s is not None:
            of_norm, cotangent = load(s, b, t, i, inside), load(g, b, t, i, inside)
        if g_2 is not None:
            cotangent_2 = load(g_2, b, t, i, inside)
        if g_total is not None:
            d = load(g_total, b, t, i, inside)
        if y is not None:
            branch = load(y, b, t, i, inside)
        if s is not None:
            n, rstd = normalize(of_norm.to(tl.float32), inside, size, eps, IS_LAYER)
            u = cotangent.to(tl.float32)
            if OF_MODULATION:
                sum_gn = tl.fma(u, n, sum_gn)
                if IS_LAYER:
                    sum_g += u
            if scale is not None:
                u *= factor
            if g_2 is not None:
                u_2 = cotangent_2.to(tl.float32)
                if OF_MODULATION:
                    sum_gn_2 = tl.fma(u_2, n, sum_gn_2)
                    sum_g_2 += u_2
                u = tl.fma(u_2, 1 + load_row(scale_2, b, i, inside), u)
            if weight is not None:
                u *= tl.load(weight + i, inside, 0).to(tl.float32)
            within = tl.fma(n, -tl.sum(u * n) / size, u)
            if IS_LAYER:
                within -= tl.sum(u) / size
            of_s = within * rstd if g_total is None else tl.fma(within, rstd, d.to(tl.float32))
            tl.store(of_x + here, of_s.to(of_x.dtype.element_ty), inside)
        else:
            of_s = d.to(tl.float32)
        if y is not None:
            sum_dy = tl.fma(of_s, branch.to(tl.float32), sum_dy)
        if gate is not None:
            tl.store(of_y + here, (load_row(gate, b, i, inside) * of_s).to(of_y.dtype.element_ty), inside)
    if parts is not None:
        step = tl.num_programs(0).to(tl.int64) * size
        place_of_sum = parts + tl.program_id(0).to(tl.int64) * size + i
        if OF_MODULATION:
            tl.store(place_of_sum, sum_gn, inside)
            place_of_sum += step
            if IS_LAYER:
                tl.store(place_of_sum, sum_g, inside)
                place_of_sum += step
            if g_2 is not None:
                tl.store(place_of_sum, sum_gn_2, inside)
                tl.store(place_of_sum + step, sum_g_2, inside)
                place_of_sum += 2 * step
        if y is not None:
            tl.store(place_of_sum, sum_dy, inside)


def modulation(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    is_layer: bool,
    eps: float,
    total: Tensor | None,
    out: Tensor | None,
    out_2: Tensor | None,
) -> None:
    """network_reference.modulation in one pass over the tokens, into total, out and out_2 [B, T, D] contiguous.

    Tensors are float32, bfloat16 or float16, on one device. Their strides are free, except that of the last dimension.
    """
    batch, tokens, size = x.shape
    if x.numel() > 0:
        tensors = tokens_of(x), by_sample(gate), tokens_of(y), weight
        rows = (by_sample(row) for row in (shift, scale, shift_2, scale_2))
        with torch.cuda.device_of(x):
            forward[(batch * triton.cdiv(tokens, TOKENS),)](
                *tensors, *rows, total, out, out_2, float(eps), tokens, size, is_layer, TOKENS, **options(size)
            )


def modulation_backward(
    g_total: Tensor | None,
    g: Tensor | None,
    g_2: Tensor | None,
    s: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    scale_2: Tensor | None,
    is_layer: bool,
    eps: float,
    of_modulation: bool,
    of_x: Tensor | None,
    of_y: Tensor | None,
    parts: Tensor | None,
) -> None:
    """network_reference.modulation_backward in one pass over the tokens, into of_x and of_y [B, T, D] contiguous and
    parts [R, B, chunks, D] float32, whose sums over the chunks are the sums over T: there are no atomics. Tensors as in
    modulation.
    """
    like = g_total if g is None else g
    assert like is not None
    batch, tokens, size = like.shape
    if like.numel() > 0:
        tensors = (tokens_of(t) for t in (g_total, g, g_2, s))
        factors = by_sample(gate), tokens_of(y), weight, by_sample(scale), by_sample(scale_2)
        chunk = TOKENS if parts is None else CHUNK
        with torch.cuda.device_of(like):
            backward[(batch * triton.cdiv(tokens, chunk),)](
                *tensors, *factors, of_x, of_y, parts, float(eps), tokens, size, is_layer, of_modulation, chunk,
                **options(size)
            )  # fmt: skip


def tokens_of(tensor: Tensor | None):
    """[B, T, D] as a kernel takes it."""
    return None if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def by_sample(row: Tensor | None):
    """[B or 1, D] or [B or 1, 1, D] as a kernel takes it."""
    return None if row is None else (row, row.stride(0) if row.shape[0] > 1 else 0)


def options(size: int) -> dict:
    """A row in one block, 8 numbers a thread, which are 16 bytes of bfloat16; 512 threads at most."""
    block = triton.next_power_of_2(size)
    return OPTIONS | {"BLOCK": block, "num_warps": min(max(block // 256, 4), 16)}
