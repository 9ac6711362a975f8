"""leap_residuals in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import block_of, launches, loadable, nonzero
from flowbp_kernels._triton.rows import add_rows, place


@triton.jit(do_not_specialize=["batch"])
def kernel(
    x_k, x_j, x_end, velocities, scales, at_j, at_end, parts_j, parts_end, nodes_j, weights_j, nodes_end, weights_end,
    batch, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where both leaps of sample b land, and this block's part of the mean absolute gap to the latents that they aim at:

    at_j[b, i] = x_k[b, i] + sum_n weights_j[n] v[nodes_j[n], b, i]            parts_j[b, block] = sum_i |at_j - x_j| / size
    at_end[b, i] = x_j[b, i] + sum_n weights_end[n] v[nodes_end[n], b, i]      parts_end[b, block] = sum_i |at_end - x_end| / size
    """
    b, i, inside = place(size, BLOCK)
    here = b * size + i
    start = tl.load(x_k + here, inside, 0).to(tl.float32)
    joint = tl.load(x_j + here, inside, 0).to(tl.float32)
    end = tl.load(x_end + here, inside, 0).to(tl.float32)
    landed_j = add_rows(start, velocities, scales, nodes_j, weights_j, batch, size, b, i, inside)
    landed_end = add_rows(joint, velocities, scales, nodes_end, weights_end, batch, size, b, i, inside)
    if at_j is not None:
        tl.store(at_j + here, landed_j.to(at_j.dtype.element_ty), inside)
        tl.store(at_end + here, landed_end.to(at_end.dtype.element_ty), inside)
    tl.store(parts_j + tl.program_id(0), tl.sum(tl.where(inside, tl.abs(landed_j - joint), 0)) / size)
    tl.store(parts_end + tl.program_id(0), tl.sum(tl.where(inside, tl.abs(landed_end - end), 0)) / size)


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
    """Mean absolute gaps of both leaps of a plan to the cached latents that they aim at, in one pass over the cache.

    x_k, x_j, x_end: [B, *S] float32, bfloat16 or float16.  velocities, scales, nodes: as in quadrature_update.
    weights: two CPU tensors [K, 1] or [K, B]: of the leap from x_k to x_j, and of the leap from x_j to x_end.
    predictions_out: [2, B, *S], gets both landings, rounded once to its dtype; None: they are not written.
    Returns [2, B] float32, the gaps of the unrounded landings. A program stores its part of each mean and one sum adds up the parts:
    no atomics, so equal inputs give equal bits.
    """
    assert all(t.is_contiguous() for t in (x_k, x_j, x_end, velocities, scales, predictions_out) if t is not None)
    cache, block = loadable(velocities), block_of(velocities)
    blocks = triton.cdiv(x_k[:1].numel(), block)
    parts = x_k.new_empty((2, len(x_k), blocks), dtype=torch.float32)
    if x_k.numel() > 0:
        with torch.cuda.device_of(x_k):
            for launch in launches(x_k, nodes, *weights, apart=True):
                s = launch.samples
                latents = x_k[s], x_j[s], x_end[s]
                mine = cache[:, s], None if scales is None else scales[:, s]
                landings = (None, None) if predictions_out is None else predictions_out[:, s].unbind()
                chosen, first, second = launch.columns
                rules = *nonzero(chosen, first), *nonzero(chosen, second)
                kernel[launch.grid(block)](*latents, *mine, *landings, *parts[:, s].unbind(), *rules, launch.batch, launch.size, block)
    return parts.sum(2)
