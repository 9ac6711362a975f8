"""The seeds of a sweep: what each replayed node's VJP starts from, all in one pass over the two gradients they mix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import check_float, check_like, check_out, check_rows, weight_table


def bridge_cotangents(
    g: Tensor,
    g_x: Tensor,
    weights: Tensor | Sequence[float],
    alphas: Tensor | Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Cotangents of all replayed nodes: c_k = weights[k] (g + alphas[k] g_x), in float32 (float64 if a tensor is float64).

    g: [B, *S], the reward's gradient at the endpoint.  g_x: [B, *S], what comes back through the bridge node's input.
    weights, alphas: [K] or [K, B], numbers or CPU tensors; alphas[k] = 0 for a node at or after the bridge, which g_x
    does not reach.
    dtype: of the result, the network's; g.dtype if None.  out: [K, B, *S] contiguous: written and returned, without
    gradient; its dtype is the result's.
    Returns [K, B, *S], rounded once. A weight or alpha of zero cuts what it multiplies, NaN included.
    Gradient: weights[k] to g, weights[k] alphas[k] to g_x; none to weights and alphas. Strided g, g_x: made contiguous.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  (weights[:, None] * (g + alphas[:, None] * g_x)).to(dtype)
    """
    check_float("g", g)
    check_like("g_x", g_x, g, "g")
    if g.dim() < 1:
        raise ValueError("g must be [B, *S]; it has no dimension")
    weights, alphas = weight_table("weights", weights, g.shape[0]), weight_table("alphas", alphas, g.shape[0])
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
        return _op(*arguments, dtype)
    _op_out(*arguments, out)
    return out


def _run(g, g_x, weights, alphas, dtype, out=None) -> Tensor:
    out = g.new_empty(weights.shape[0], *g.shape, dtype=dtype) if out is None else backend.written(out)
    runs = backend.select("bridge_cotangents", weights.shape[0], g=g, g_x=g_x, out=out)
    if runs == "reference":
        out.copy_(reference.bridge_cotangents(g, g_x, weights, alphas, out.dtype))
    elif runs == "triton":
        backend.triton_op("bridge_cotangents")(g, g_x, weights, alphas, dtype=out.dtype, out=out)
    else:
        torch.ops.flowbp_compiled.bridge_cotangents(g, g_x, weights, alphas, out)
    return out


@torch.library.custom_op("flowbp_kernels::bridge_cotangents_out", mutates_args=("out",))
def _op_out(g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, out: Tensor) -> None:
    _run(g, g_x, weights, alphas, out.dtype, out)


@torch.library.custom_op("flowbp_kernels::bridge_cotangents", mutates_args=())
def _op(g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, dtype: torch.dtype) -> Tensor:
    return _run(g, g_x, weights, alphas, dtype)


@_op.register_fake
def _(g, g_x, weights, alphas, dtype):
    return g.new_empty(len(weights), *g.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    g, g_x, weights, alphas, _ = inputs
    ctx.save_for_backward(weights, alphas)
    ctx.dtypes = g.dtype, g_x.dtype


def _backward(ctx, gradients):
    """The adjoint of spreading one tensor over K nodes is the weighted sum over them."""
    weights, alphas = ctx.saved_tensors
    nodes, gradients = torch.arange(len(weights)), gradients.contiguous()
    of_g, of_g_x = (
        quadrature_update(gradients.new_zeros(gradients.shape[1:], dtype=dtype), gradients, nodes, table) if needed else None
        for needed, dtype, table in zip(ctx.needs_input_grad[:2], ctx.dtypes, (weights, weights * alphas), strict=True)
    )
    return of_g, of_g_x, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)

# The two sums of this package are each other's gradient; imported last, since each needs the other.
from flowbp_kernels.quadrature_update import quadrature_update  # noqa: E402
