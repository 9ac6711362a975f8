"""bridge_cotangents in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import launches
from flowbp_kernels._triton.rows import place

BLOCK = 1024  # with 4 warps: one 16-byte store of bfloat16 a thread and node, two of float32


@triton.jit(do_not_specialize=["batch"])
def kernel(g, g_x, out, weights, alphas, batch, size, BLOCK: tl.constexpr):
    """out[k, b, i] = weights[k] (g[b, i] + alphas[k] g_x[b, i]); a coefficient of zero cuts what it multiplies, a NaN too."""
    b, i, inside = place(size, BLOCK)
    of_reward = tl.load(g + b * size + i, inside).to(tl.float32)
    of_bridge = tl.load(g_x + b * size + i, inside).to(tl.float32)
    for k in tl.static_range(len(weights)):
        weight, alpha = tl.cast(weights[k], tl.float32), tl.cast(alphas[k], tl.float32)
        total = tl.where(alpha == 0, of_reward, tl.fma(of_bridge, alpha, of_reward))
        seed = tl.where(weight == 0, 0.0, weight * total)
        row = tl.full((), k, tl.int64) * batch + b
        tl.store(out + row * size + i, seed.to(out.dtype.element_ty), inside)


def bridge_cotangents(
    g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """weights[k] (g + alphas[k] g_x) for every node k, in one pass over g and g_x.

    g, g_x: [B, *S] float32, bfloat16 or float16, contiguous, on one device.  weights, alphas: [K, 1] or [K, B] CPU tensors.
    Returns out (default: a new tensor of `dtype`, itself g.dtype by default), [K, B, *S], computed in float32, rounded once.
    """
    out = g.new_empty((len(weights), *g.shape), dtype=dtype or g.dtype) if out is None else out
    assert all(t.is_contiguous() for t in (g, g_x, out))
    if out.numel() > 0:
        with torch.cuda.device_of(g):
            for launch in launches(g, weights, alphas):
                s = launch.samples
                kernel[launch.grid(BLOCK)](g[s], g_x[s], out[:, s], *launch.columns, launch.batch, launch.size, BLOCK)
    return out
