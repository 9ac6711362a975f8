"""leap_residuals in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS, block_of, grid, loadable
from flowbp_kernels._triton.rows import add_rows, place


@triton.jit(do_not_specialize=["node_columns", "columns_j", "columns_end", "num_nodes", "num_cached", "count"])
def kernel(
    x_k, x_j, x_end, velocities, scales, at_j, at_end, parts_j, parts_end, nodes, node_columns, weights_j, columns_j,
    weights_end, columns_end, num_nodes, num_cached, count, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where both leaps of sample b land, and this block's part of the mean absolute gap to the latents that they aim
    at.

    at_j[b, i] = x_k[b, i] + sum_n weights_j[n, b] v[nodes[n, b], b, i]
    at_end[b, i] = x_j[b, i] + sum_n weights_end[n, b] v[nodes[n, b], b, i]
    parts_j[b, block] = sum_i |at_j - x_j| / size
    parts_end[b, block] = sum_i |at_end - x_end| / size
    """
    b, i, inside = place(tl.program_id(0), size, BLOCK)
    here = b * size + i
    cache = velocities, scales, nodes, node_columns
    joint = tl.load(x_j + here, inside, 0).to(tl.float32)
    start = tl.load(x_k + here, inside, 0).to(tl.float32)
    landed = add_rows(start, *cache, weights_j, columns_j, num_nodes, num_cached, count, size, b, i, inside)
    if at_j is not None:
        tl.store(at_j + here, landed.to(at_j.dtype.element_ty), inside)
    tl.store(parts_j + tl.program_id(0), tl.sum(tl.where(inside, tl.abs(landed - joint), 0)) / size)
    landed = add_rows(joint, *cache, weights_end, columns_end, num_nodes, num_cached, count, size, b, i, inside)
    if at_end is not None:
        tl.store(at_end + here, landed.to(at_end.dtype.element_ty), inside)
    end = tl.load(x_end + here, inside, 0).to(tl.float32)
    tl.store(parts_end + tl.program_id(0), tl.sum(tl.where(inside, tl.abs(landed - end), 0)) / size)


def leap_residuals(
    x_k: Tensor,
    x_j: Tensor,
    x_end: Tensor,
    velocities: Tensor,
    nodes: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor | None = None,
    predictions_out: Tensor | None = None,
) -> Tensor:
    """Mean absolute gaps of both leaps of a plan to the cached latents that they aim at. Each leap takes one pass over
    the rows that it reads.

    x_k, x_j, x_end: [B, *S] float32, bfloat16 or float16.  velocities, nodes, scales: as in quadrature_update.
    weights: two tensors [K, 1] or [K, B] float64: of the leap from x_k to x_j, and of the leap from x_j to x_end.
    predictions_out: [2, B, *S], gets both landings, rounded once to its dtype; None: they are not written.
    Returns [2, B] float32, the gaps of the unrounded landings. Each program stores its part of each mean, and one sum
    adds up the parts: there are no atomics, so equal inputs give equal bits.
    """
    inputs = x_k, x_j, x_end, velocities, nodes, *weights
    assert all(t.is_contiguous() for t in (*inputs, scales, predictions_out) if t is not None)
    cache, block = loadable(velocities), block_of(velocities)
    count, size = len(x_k), x_k[:1].numel()
    parts = x_k.new_empty((2, count, triton.cdiv(size, block)), dtype=torch.float32)
    if x_k.numel() > 0:
        landings = (None, None) if predictions_out is None else predictions_out.unbind()
        tables = [argument for table in (nodes, *weights) for argument in (table, table.shape[1])]
        rule = *tables, len(nodes), len(velocities)
        with torch.cuda.device_of(x_k):
            kernel[grid(count, size, block)](
                x_k, x_j, x_end, cache, scales, *landings, *parts.unbind(), *rule, count, size, block, **OPTIONS
            )
    return parts.sum(2)
