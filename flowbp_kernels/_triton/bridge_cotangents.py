"""bridge_cotangents in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS, grid, runs
from flowbp_kernels._triton.rows import GROUP, entry, place

BLOCK = 1024  # with 4 warps: one 16-byte store of bfloat16 a thread and node, two of float32


@triton.jit(do_not_specialize=["weight_columns", "alpha_columns", "num_nodes", "count"])
def kernel(g, g_x, out, weights, weight_columns, alphas, alpha_columns, num_nodes, count, size, BLOCK: tl.constexpr):
    """out[k, b, i] = weights[k, b] (g[b, i] + alphas[k, b] g_x[b, i]). A coefficient of zero cuts what it multiplies,
    NaN included.
    """
    b, i, inside = place(tl.program_id(0), size, BLOCK)
    of_reward = tl.load(g + b * size + i, inside).to(tl.float32)
    of_bridge = tl.load(g_x + b * size + i, inside).to(tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < num_nodes:
        for k in tl.static_range(GROUP):
            exists = first + k < num_nodes
            weight = entry(weights, weight_columns, first + k, b, exists).to(tl.float32)
            alpha = entry(alphas, alpha_columns, first + k, b, exists).to(tl.float32)
            total = tl.where(alpha == 0, of_reward, tl.fma(of_bridge, alpha, of_reward))
            seed = tl.where(weight == 0, 0.0, weight * total)
            row = (first + k).to(tl.int64) * count + b
            tl.store(out + row * size + i, seed.to(out.dtype.element_ty), tl.where(exists, inside, False))
        first += GROUP


def bridge_cotangents(
    g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """weights[k] (g + alphas[k] g_x) for every node k, in one pass over g and g_x.

    g, g_x: [B, *S] float32, bfloat16 or float16.  weights, alphas: [K, 1] or [K, B] float64.
    Returns out [K, B, *S] (default: a new tensor of `dtype`, which is g.dtype by default), computed in float32, rounded
    once. All are contiguous, on one device.
    """
    out = g.new_empty((len(weights), *g.shape), dtype=dtype or g.dtype) if out is None else out
    assert all(t.is_contiguous() for t in (g, g_x, weights, alphas, out))
    if out.numel() > 0:
        count, size = runs(g, weights, alphas)
        rule = weights, weights.shape[1], alphas, alphas.shape[1], len(weights)
        with torch.cuda.device_of(g):
            kernel[grid(count, size, BLOCK)](g, g_x, out, *rule, count, size, BLOCK, **OPTIONS)
    return out
