"""qk_norm in Triton: one launch for the queries and keys of all streams, forward and backward.

A program takes whole tokens, all heads of queries or of keys, so that it reads the token's angles once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS

BLOCK = 1024  # elements of the heads that a program takes at a time: one 16-byte load a thread, two for float32
TOKENS = 4  # of one program of the backward, which stores one partial sum for a weight's gradient


@triton.jit(do_not_specialize=["tokens", "heads", "rope_stride"])
def kernel(
    queries, keys, queries_2, keys_2, weight_q, weight_k, weight_q_2, weight_k_2, cos, sin, q, k, strides, strides_2,
    rope_stride, tokens, heads, width, eps, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """q[b, t, h] = R[b, t] (weight_q * x / sqrt(mean(x^2) + eps)) with x = queries[b, t, h], or, from t = tokens on,
    with queries_2[b, t - tokens, h] and weight_q_2; k alike.
    """
    t, b, is_key = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    second = t >= tokens
    at = (b * tl.num_programs(0) + t) * heads * width
    x, stride = token(queries, keys, queries_2, keys_2, strides, strides_2, is_key, second, b, t, tokens)
    joint = tl.where(is_key, k, q) + at
    weight = weight_of(weight_q, weight_k, weight_q_2, weight_k_2, is_key, second, width, DIM)
    rotation = angles(cos, sin, b * rope_stride + t.to(tl.int64) * width, width, DIM)
    for first in range(0, heads, HEADS):
        h, i, inside = places(first, heads, width, HEADS, DIM)
        y = tl.load(x + h * stride + i, inside, 0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
        if weight is not None:
            y *= weight
        if rotation is not None:
            cos_0, cos_1, sin_0, sin_1 = rotation
            y = rotate(y, cos_0, cos_1, sin_0, sin_1, HEADS, DIM)
        tl.store(joint + h * width + i, y.to(q.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "tokens_2", "heads", "rope_stride"])
def backward_kernel(
    g_q, g_k, queries, keys, queries_2, keys_2, weight_q, weight_k, weight_q_2, weight_k_2, cos, sin, of_queries,
    of_keys, of_queries_2, of_keys_2, parts, strides_g, strides, strides_2, rope_stride, tokens, tokens_2, heads,
    width, eps, HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """With x = queries[b, t, h], n = x / sqrt(mean(x^2) + eps) and v = R[b, t]^T g_q[b, t, h]:
    of_queries[b, t, h] = (v weight - n mean(v weight n)) / sqrt(mean(x^2) + eps)
    parts[0, b, chunk] = sum_{t, h} v n   over the TOKENS tokens of a chunk of one stream; keys and streams alike.
    """
    chunk, b, is_key = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    chunks = tl.cdiv(tokens, TOKENS)
    second = chunk >= chunks
    first_token = tl.where(second, chunk - chunks, chunk) * TOKENS
    length = tl.where(second, tokens_2, tokens)
    weight = weight_of(weight_q, weight_k, weight_q_2, weight_k_2, is_key, second, width, DIM)
    total = tl.zeros((HEADS, DIM), tl.float32)
    for t in range(first_token, tl.minimum(first_token + TOKENS, length)):
        joint_t = tl.where(second, tokens + t, t)
        x, stride = token(queries, keys, queries_2, keys_2, strides, strides_2, is_key, second, b, joint_t, tokens)
        of_x = pick(of_queries, of_keys, of_queries_2, of_keys_2, is_key, second)
        of_x += (b * length + t) * heads * width
        g = tl.where(is_key, g_k, g_q) + b * strides_g[0] + joint_t.to(tl.int64) * strides_g[1]
        rotation = angles(cos, sin, b * rope_stride + joint_t.to(tl.int64) * width, width, DIM)
        for first in range(0, heads, HEADS):
            h, i, inside = places(first, heads, width, HEADS, DIM)
            n = tl.load(x + h * stride + i, inside, 0).to(tl.float32)
            v = tl.load(g + h * strides_g[2] + i, inside, 0).to(tl.float32)
            if rotation is not None:
                cos_0, cos_1, sin_0, sin_1 = rotation
                v = rotate(v, cos_0, cos_1, -sin_1, -sin_0, HEADS, DIM)
            rstd = tl.rsqrt(tl.sum(n * n, 1) / width + eps)[:, None]
            n *= rstd
            if parts is not None:
                total = tl.fma(v, n, total)
            if weight is not None:
                v *= weight
            mean = (tl.sum(v * n, 1) / width)[:, None]
            tl.store(of_x + h * width + i, (tl.fma(-n, mean, v) * rstd).to(of_queries.dtype.element_ty), inside)
    if parts is not None:
        i = tl.arange(0, DIM)
        row = (is_key.to(tl.int64) * tl.num_programs(1) + b) * tl.num_programs(0) + chunk
        tl.store(parts + row * width + i, tl.sum(total, 0), i < width)


@triton.jit
def pick(of_q, of_k, of_q_2, of_k_2, is_key, second):
    """One of four alike, of which the last two may be None."""
    chosen = tl.where(is_key, of_k, of_q)
    if of_q_2 is not None:
        chosen = tl.where(second, tl.where(is_key, of_k_2, of_q_2), chosen)
    return chosen


@triton.jit
def token(queries, keys, queries_2, keys_2, strides, strides_2, is_key, second, b, t, tokens):
    """Where token t of the joint sequence begins in its stream, and the stride of that stream's heads."""
    x = pick(queries, keys, queries_2, keys_2, is_key, second)
    stride_b, stride_t, stride_h = strides
    if queries_2 is not None:
        stride_b = tl.where(second, strides_2[0], stride_b)
        stride_t = tl.where(second, strides_2[1], stride_t)
        stride_h = tl.where(second, strides_2[2], stride_h)
    t = tl.where(second, t - tokens, t).to(tl.int64)
    return x + b * stride_b + t * stride_t, stride_h


@triton.jit
def weight_of(weight_q, weight_k, weight_q_2, weight_k_2, is_key, second, width, DIM: tl.constexpr):
    """The weight of a program's stream in float32 [1, DIM], or None."""
    if weight_q is None:
        return None
    else:
        i = tl.arange(0, DIM)
        weight = pick(weight_q, weight_k, weight_q_2, weight_k_2, is_key, second)
        return tl.load(weight + i, i < width, 0).to(tl.float32)[None, :]


@triton.jit
def angles(cos, sin, at, width, DIM: tl.constexpr):
    """(cos_0, cos_1, sin_0, sin_1) of a token's pairs, [1, DIM / 2] each, or None. Without sin, cos is a table of pairs
    (cosine, sine), in which both coordinates of a pair share an angle.
    """
    if cos is None:
        return None
    else:
        i = tl.arange(0, DIM)
        cos_0, cos_1 = tl.split(tl.reshape(tl.load(cos + at + i, i < width, 0)[None, :], (1, DIM // 2, 2)))
        if sin is None:
            return cos_0, cos_0, cos_1, cos_1
        else:
            sin_0, sin_1 = tl.split(tl.reshape(tl.load(sin + at + i, i < width, 0)[None, :], (1, DIM // 2, 2)))
            return cos_0, cos_1, sin_0, sin_1


@triton.jit
def places(first, heads, width, HEADS: tl.constexpr, DIM: tl.constexpr):
    """(h, i, inside): heads from `first` on [HEADS, 1], elements [1, DIM], and which of these exist."""
    h = (first + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, DIM)[None, :]
    return h.to(tl.int64), i, (h < heads) & (i < width)


@triton.jit
def rotate(x, cos_0, cos_1, sin_0, sin_1, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Every pair (x_0, x_1) of neighbours becomes (cos_0 x_0 - sin_0 x_1, cos_1 x_1 + sin_1 x_0)."""
    x_0, x_1 = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
    return tl.interleave(tl.fma(-sin_0, x_1, cos_0 * x_0), tl.fma(sin_1, x_0, cos_1 * x_1))


def qk_norm(
    queries: Tensor,
    keys: Tensor,
    queries_2: Tensor | None,
    keys_2: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_q_2: Tensor | None,
    weight_k_2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k [B, T_total, H, d], contiguous: each head over its root mean square, times its stream's weight, rotated;
    computed in float32, rounded once.

    queries, keys, queries_2, keys_2: [B, T, H, d] float32, bfloat16 or float16; the second stream may be None.
    weights: [d], any of those dtypes, or None for ones.  cos, sin: [1, T_total, d] float32 each; or a table
    [1 or B, T_total, d] of pairs (cosine, sine) and None; or None and None.
    """
    batch, tokens, heads, width = queries.shape
    streams, strides = _streams(queries, keys, queries_2, keys_2)
    total = tokens + (0 if queries_2 is None else queries_2.shape[1])
    q, k = (queries.new_empty(batch, total, heads, width) for _ in range(2))
    if q.numel() > 0:
        weights = _weights(queries, 1 if queries_2 is None else 2, weight_q, weight_k, weight_q_2, weight_k_2)
        with torch.cuda.device_of(queries):
            kernel[(total, batch, 2)](
                *streams, *weights, cos, sin, q, k, *strides, _rope_stride(cos), tokens, heads, width, eps,
                *_block(heads, width), **OPTIONS
            )  # fmt: skip
    return q, k


def qk_norm_backward(
    g_q: Tensor,
    g_k: Tensor,
    queries: Tensor,
    keys: Tensor,
    queries_2: Tensor | None,
    keys_2: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_q_2: Tensor | None,
    weight_k_2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """The gradients of the streams that there are, and, if of_weights, of the weights that there are.

    g_q, g_k: [B, T_total, H, d], of which q and k are those of qk_norm; the others as there. A weight's gradient is the
    sum of partial sums, one a chunk of TOKENS tokens, in float32. There are no atomics: equal inputs give equal bits.
    """
    batch, tokens, heads, width = queries.shape
    tokens_2 = 0 if queries_2 is None else queries_2.shape[1]
    (g_q, g_k), strides_g = _alike(g_q, g_k)
    streams, strides = _streams(queries, keys, queries_2, keys_2)
    gradients = [None if x is None else x.new_empty(x.shape) for x in streams]
    each = weight_q, weight_k, weight_q_2, weight_k_2
    chunks, chunks_2 = triton.cdiv(tokens, TOKENS), triton.cdiv(tokens_2, TOKENS)
    parts = None
    if of_weights:
        make = queries.new_empty if g_q.numel() > 0 else queries.new_zeros
        parts = make((2, batch, chunks + chunks_2, width), dtype=torch.float32)
    if g_q.numel() > 0:
        weights = _weights(queries, 1 if queries_2 is None else 2, *each)
        with torch.cuda.device_of(queries):
            backward_kernel[(chunks + chunks_2, batch, 2)](
                g_q, g_k, *streams, *weights, cos, sin, *gradients, parts, strides_g, *strides,
                _rope_stride(cos), tokens, tokens_2, heads, width, eps, *_block(heads, width), TOKENS, **OPTIONS
            )  # fmt: skip
    found = [gradient for gradient in gradients if gradient is not None]
    if parts is not None:
        for weight, part in zip(each, (*parts[:, :, :chunks], *parts[:, :, chunks:]), strict=True):
            if weight is not None:
                found.append(part.sum((0, 1)).to(weight.dtype))
    return found


def _streams(queries: Tensor, keys: Tensor, queries_2: Tensor | None, keys_2: Tensor | None):
    """(the four tensors, (strides, strides_2)) with d contiguous, and one set of strides for each stream."""
    (queries, keys), strides = _alike(queries, keys)
    if queries_2 is None or keys_2 is None:
        return (queries, keys, None, None), (strides, strides)
    (queries_2, keys_2), strides_2 = _alike(queries_2, keys_2)
    return (queries, keys, queries_2, keys_2), (strides, strides_2)


def _alike(first: Tensor, second: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Two tensors of the same strides over B, T and H, and of stride 1 over d: as they are, or copies."""
    if first.stride() != second.stride() or first.stride(3) != 1:
        first, second = first.contiguous(), second.contiguous()
    return (first, second), first.stride()[:3]


def _weights(x: Tensor, streams: int, *each: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weights of the streams that a kernel can choose from: all of one dtype, ones beside others, or all None."""
    given = [weight for weight in each if weight is not None]
    if not given:
        return each
    dtype = given[0].dtype if all(weight.dtype == given[0].dtype for weight in given) else torch.float32
    filled = (
        torch.ones(x.shape[3], dtype=dtype, device=x.device) if weight is None else weight.to(dtype).contiguous()
        for weight in each[: 2 * streams]
    )
    return *filled, *each[2 * streams :]


def _rope_stride(cos: Tensor | None) -> int:
    """Between the tables of two samples; 0 where all share one."""
    return 0 if cos is None or len(cos) == 1 else cos.stride(0)


def _block(heads: int, width: int) -> tuple[int, int]:
    """(HEADS, DIM)."""
    dim = max(2, triton.next_power_of_2(width))
    return min(triton.next_power_of_2(heads), max(1, BLOCK // dim)), dim
