"""quadrature_update in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import block_of, launches, loadable, nonzero
from flowbp_kernels._triton.rows import add_rows, place


@triton.jit(do_not_specialize=["batch"])
def kernel(x, velocities, scales, out, nodes, weights, batch, size, BLOCK: tl.constexpr):
    """out[b, i] = x[b, i] + sum_k weights[k] scales[nodes[k], b] velocities[nodes[k], b, i]"""
    b, i, inside = place(size, BLOCK)
    start = tl.load(x + b * size + i, inside).to(tl.float32)
    end = add_rows(start, velocities, scales, nodes, weights, batch, size, b, i, inside)
    tl.store(out + b * size + i, end.to(out.dtype.element_ty), inside)


def quadrature_update(
    x: Tensor, velocities: Tensor, nodes: Tensor, weights: Tensor, scales: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x + sum_k weights[k] scales[nodes[k]] velocities[nodes[k]], accumulated in float32, one FMA a node in the order given.

    x: [B, *S] float32, bfloat16 or float16.  velocities: [N, B, *S], one of those or float8_e4m3fn.  All contiguous, on one device.
    nodes, weights: [K, 1] or [K, B] CPU tensors.  scales: [N, B] float32 on the device: what each cached row is to be multiplied by.
    Returns out (default: a new tensor like x), [B, *S] in any of x's dtypes; it may be x.
    """
    out = torch.empty_like(x) if out is None else out
    assert all(t.is_contiguous() for t in (x, velocities, out, scales) if t is not None)
    if x.numel() == 0:
        return out
    cache, block = loadable(velocities), block_of(velocities)
    with torch.cuda.device_of(x):
        for launch in launches(x, nodes, weights, apart=scales is not None):
            s = launch.samples
            rule = nonzero(*launch.columns)
            mine = None if scales is None else scales[:, s]
            kernel[launch.grid(block)](x[s], cache[:, s], mine, out[s], *rule, launch.batch, launch.size, block)
    return out
