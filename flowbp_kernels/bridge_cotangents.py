"""The seeds of a sweep: the cotangent from which each replayed node's VJP starts, for all nodes in one pass over the
two gradients that they are mixed from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import check_float, check_like, check_out, check_rows, weight_table
from flowbp_kernels.operators import register


def bridge_cotangents(
    g: Tensor,
    g_x: Tensor,
    weights: Tensor | Sequence,
    alphas: Tensor | Sequence,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Cotangents of all replayed nodes: c_k = weights[k] (g + alphas[k] g_x), in float32 (float64 if a tensor is
    float64).

    g: [B, *S], the reward's gradient at the endpoint.  g_x: [B, *S], what comes back through the bridge node's input.
    weights, alphas: [K] or [K, B], both by value (numbers, CPU tensors) or both on g's device, as in quadrature_update;
    alphas[k] = 0 for a node at or after the bridge, which g_x does not reach.
    dtype: of the result, the network's; g.dtype if None.  out: [K, B, *S] contiguous: written and returned, without
    gradient; its dtype is the result's. It overlaps no other argument in memory.
    Returns [K, B, *S], rounded once. A weight or alpha of zero cuts what it multiplies, NaN included.
    Gradient: weights[k] to g, weights[k] alphas[k] to g_x; none to weights and alphas. Strided g, g_x: made contiguous.
    Raises ValueError for shapes, dtypes, devices or memory outside this contract.
    Equivalent to  (weights[:, None] * (g + alphas[:, None] * g_x)).to(dtype)
    """
    check_float("g", g)
    check_like("g_x", g_x, g, "g")
    if g.dim() < 1:
        raise ValueError("g must be [B, *S]; it has no dimension")
    weights, alphas = weight_table("weights", weights, g), weight_table("alphas", alphas, g)
    check_rows("weights", weights, alphas, "alphas")
    if dtype is None:
        dtype = g.dtype if out is None else out.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, not {dtype}")
    check_out("out", out, (len(weights), *g.shape), (dtype,), (g, g_x))
    arguments = g.contiguous(), g_x.contiguous(), weights, alphas
    if not backend.needs_operator(g, g_x, out):
        return _run(*arguments, dtype, out)
    if out is None:
        return _op.of(weights)(*arguments, dtype)
    _op_out.of(weights)(*arguments, out)
    return out


def _run(g, g_x, weights, alphas, dtype, out=None) -> Tensor:
    if out is None:
        out = g.new_empty(weights.shape[0], *g.shape, dtype=dtype)
    else:
        backend.written("out", out, {"g": g, "g_x": g_x, "weights": weights, "alphas": alphas})
    runs = backend.select("bridge_cotangents", weights.shape[0], g=g, g_x=g_x, out=out)
    if runs == "reference":
        out.copy_(reference.bridge_cotangents(g, g_x, weights, alphas, out.dtype))
    elif runs == "triton":
        _, weights, alphas = backend.triton_tables(g, None, weights, alphas)
        backend.triton_op("bridge_cotangents")(g, g_x, weights, alphas, dtype=out.dtype, out=out)
    else:
        torch.ops.flowbp_compiled.bridge_cotangents(g, g_x, weights, alphas, out)
    return out


def _into(g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, out: Tensor) -> None:
    _run(g, g_x, weights, alphas, out.dtype, out)


def _new(g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, dtype: torch.dtype) -> Tensor:
    return _run(g, g_x, weights, alphas, dtype)


def _fake(g, g_x, weights, alphas, dtype):
    return g.new_empty(len(weights), *g.shape, dtype=dtype)


_op = register(_new, "bridge_cotangents", fake=_fake)  # its gradient: adjoints.py
_op_out = register(_into, "bridge_cotangents_out", mutates=("out",))
