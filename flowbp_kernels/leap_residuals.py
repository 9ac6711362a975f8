"""How far the two leaps of a surrogate trajectory land from the cached one, in one pass over the cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import (
    accumulation_dtype,
    check_cache,
    check_float,
    check_like,
    check_nodes,
    check_out,
    check_rows,
    node_table,
    weight_table,
)
from flowbp_kernels.operators import register

CHUNK = 2048  # elements whose gaps make one partial sum: kChunk in csrc/ops.h


def leap_residuals(
    x_k: Tensor,
    x_j: Tensor,
    x_end: Tensor,
    velocities: Tensor,
    nodes: Tensor | Sequence[int],
    weights: Sequence[Tensor | Sequence],
    *,
    scales: Tensor | None = None,
    predictions_out: Tensor | None = None,
) -> Tensor:
    """d_j and d_0, the mean absolute gap of each sample between where a leap lands and the cached latent it aims at.

        d_j = mean |x_k + sum_i weights[0][i] v_i - x_j|        d_0 = mean |x_j + sum_i weights[1][i] v_i - x_end|

    with v_i = scales[nodes[i]] velocities[nodes[i]], summed in float32 (float64 if a tensor is float64).
    x_k, x_j, x_end: [B, *S], one float dtype, S not empty.  velocities, nodes, scales: as in quadrature_update.
    weights: two rows [K] or [K, B] in sigma units, by value or on the device as the nodes are. A weight of zero skips
    its node, so that each leap reads its own nodes; a node of neither leap is not read.
    predictions_out: [2, B, *S] contiguous, float32, bfloat16 or float16 (float64 with float64): gets both landings. It
    overlaps no other argument in memory.
    Returns [2, B] float32 (float64), whose sums run in one fixed order: equal inputs give equal bits.
    Gradient: none. A residual weights a loss and is not part of one; backward raises RuntimeError.
    Strided latents are made contiguous; a strided cache runs on the reference.
    Raises ValueError for shapes, dtypes, devices, nodes or memory outside this contract.
    Equivalent to  landed = quadrature_update(x_k, velocities, nodes, weights[0]);
    (landed.float() - x_j.float()).abs().flatten(1).mean(1)  and the same from x_j to x_end
    """
    check_float("x_k", x_k)
    check_like("x_j", x_j, x_k, "x_k")
    check_like("x_end", x_end, x_k, "x_k")
    if not x_k.dtype == x_j.dtype == x_end.dtype:
        raise ValueError(
            f"x_k, x_j and x_end are {x_k.dtype}, {x_j.dtype} and {x_end.dtype}; they must share one dtype: cast them"
        )
    check_cache(velocities, x_k, scales)
    if x_k.shape[1:].numel() == 0:
        raise ValueError(f"a sample of shape {tuple(x_k.shape[1:])} has no elements to take a mean over")
    if not isinstance(weights, (Sequence, Tensor)) or isinstance(weights, Tensor) and not weights.dim():
        raise ValueError(f"weights must hold two rows, one a leap; got {repr(weights)[:80]}")
    if len(weights) != 2:
        raise ValueError(f"weights must hold two rows, one a leap; got {len(weights)}")
    nodes = node_table(nodes, x_k)
    first, second = (weight_table(f"weights[{leap}]", row, x_k) for leap, row in enumerate(weights))
    check_rows("nodes", nodes, first, "weights[0]")
    check_rows("nodes", nodes, second, "weights[1]")
    inputs = (x_k, x_j, x_end, velocities)
    dtypes = (
        (torch.float64,)
        if accumulation_dtype(*inputs) == torch.float64
        else (torch.float32, torch.bfloat16, torch.float16)
    )
    check_out("predictions_out", predictions_out, (2, *x_k.shape), dtypes, inputs)
    arguments = (x_k.contiguous(), x_j.contiguous(), x_end.contiguous(), velocities, nodes, first, second, scales)
    if not backend.needs_operator(*inputs, predictions_out):
        return _run(*arguments, predictions_out)
    if predictions_out is None:
        return _op.of(nodes)(*arguments)
    return _op_out.of(nodes)(*arguments, predictions_out)


def _run(x_k, x_j, x_end, velocities, nodes, first, second, scales, predictions=None) -> Tensor:
    check_nodes(nodes, velocities)
    latents = {"x_k": x_k, "x_j": x_j, "x_end": x_end}
    if predictions is not None:
        rule = {"scales": scales, "nodes": nodes, "weights[0]": first, "weights[1]": second}
        backend.written("predictions_out", predictions, latents | {"velocities": velocities} | rule)
    runs = backend.select(
        "leap_residuals", nodes.shape[0], **latents, velocities=velocities, predictions_out=predictions
    )
    if runs == "reference":
        residuals, landings = reference.leap_residuals(x_k, x_j, x_end, velocities, nodes, (first, second), scales)
        if predictions is not None:
            predictions.copy_(landings)
        return residuals
    if runs == "triton":
        nodes, *weights = backend.triton_tables(x_k, nodes, first, second)
        launch = backend.triton_op("leap_residuals")
        return launch(*latents.values(), velocities, nodes, weights, scales=scales, predictions_out=predictions)
    residuals = _empty(*latents.values(), velocities)
    chunks = -(-x_k.shape[1:].numel() // CHUNK)
    partials = residuals.new_empty(2, len(x_k), chunks)
    torch.ops.flowbp_compiled.leap_residuals(
        *latents.values(), velocities, nodes, first, second, scales, predictions, partials, residuals
    )
    return residuals


def _empty(x_k, x_j, x_end, velocities, *_) -> Tensor:
    return x_k.new_empty(2, x_k.shape[0], dtype=accumulation_dtype(x_k, x_j, x_end, velocities))


def _into(
    x_k: Tensor,
    x_j: Tensor,
    x_end: Tensor,
    velocities: Tensor,
    nodes: Tensor,
    first: Tensor,
    second: Tensor,
    scales: Tensor | None,
    predictions: Tensor,
) -> Tensor:
    return _run(x_k, x_j, x_end, velocities, nodes, first, second, scales, predictions)


def _new(
    x_k: Tensor,
    x_j: Tensor,
    x_end: Tensor,
    velocities: Tensor,
    nodes: Tensor,
    first: Tensor,
    second: Tensor,
    scales: Tensor | None,
) -> Tensor:
    return _run(x_k, x_j, x_end, velocities, nodes, first, second, scales)


def _backward(ctx, *_):
    raise RuntimeError(
        "leap_residuals has no gradient: a residual weights a loss. Detach its inputs; for a gap to descend on, take "
        "(quadrature_update(...) - target).abs().mean()."
    )


_op = register(_new, "leap_residuals", fake=_empty)
_op.differentiate(_backward)
_op_out = register(_into, "leap_residuals_out", mutates=("predictions",), fake=_empty)
