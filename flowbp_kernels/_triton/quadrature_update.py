"""quadrature_update in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS, block_of, grid, loadable, runs
from flowbp_kernels._triton.rows import add_rows, place


@triton.jit(do_not_specialize=["node_columns", "weight_columns", "num_nodes", "num_cached", "count"])
def kernel(
    x, velocities, scales, out, nodes, node_columns, weights, weight_columns, num_nodes, num_cached, count, size,
    BLOCK: tl.constexpr
):  # fmt: skip
    """out[b, i] = x[b, i] + sum_k weights[k, b] scales[nodes[k, b], b] velocities[nodes[k, b], b, i]"""
    b, i, inside = place(tl.program_id(0), size, BLOCK)
    start = tl.load(x + b * size + i, inside).to(tl.float32)
    end = add_rows(
        start, velocities, scales, nodes, node_columns, weights, weight_columns, num_nodes, num_cached, count, size,
        b, i, inside
    )  # fmt: skip
    tl.store(out + b * size + i, end.to(out.dtype.element_ty), inside)


def quadrature_update(
    x: Tensor,
    velocities: Tensor,
    nodes: Tensor,
    weights: Tensor,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x + sum_k weights[k] scales[nodes[k]] velocities[nodes[k]], accumulated in float32, one FMA a node in the order
    given.

    x: [B, *S] float32, bfloat16 or float16.  velocities: [N, B, *S], one of those or float8_e4m3fn.
    nodes: [K, 1] or [K, B] int64.  weights: [K, 1] or [K, B] float64.  scales: [N, B] float32, or None for ones.
    Returns out [B, *S] in any of x's dtypes (default: a new tensor like x); it may be x. All are contiguous, on one
    device.
    """
    out = torch.empty_like(x) if out is None else out
    assert all(t.is_contiguous() for t in (x, velocities, nodes, weights, scales, out) if t is not None)
    if x.numel() > 0:
        cache, block = loadable(velocities), block_of(velocities)
        count, size = runs(x, nodes, weights, apart=scales is not None)
        rule = nodes, nodes.shape[1], weights, weights.shape[1], len(nodes), len(velocities)
        with torch.cuda.device_of(x):
            kernel[grid(count, size, block)](x, cache, scales, out, *rule, count, size, block, **OPTIONS)
    return out
