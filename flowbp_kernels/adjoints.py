"""The gradients of quadrature_update and bridge_cotangents. Each op computes the gradient of the other.

quadrature_update   x, v_n  ->  x + sum_n w_n v_n    its gradient, by bridge_cotangents:   g    ->  w_n g for every n
bridge_cotangents   g, g_x  ->  w_n (g + a_n g_x)    its gradient, by quadrature_update:   c_n  ->  sum_n w_n c_n and
                                                                                                    sum_n w_n a_n c_n
"""

import torch

from flowbp_kernels.bridge_cotangents import _op as spread_op
from flowbp_kernels.bridge_cotangents import bridge_cotangents
from flowbp_kernels.quadrature_update import _op as sum_op
from flowbp_kernels.quadrature_update import quadrature_update


def _keep_rule(ctx, inputs, output):
    _, velocities, nodes, weights, scales = inputs
    ctx.save_for_backward(nodes, weights, scales)
    ctx.cache_shape, ctx.cache_dtype = velocities.shape, velocities.dtype


def _spread(ctx, g):
    """The gradient of quadrature_update: velocity n of sample b gets g times the sum of all weights with which the
    sample's rule reads that velocity.
    """
    of_velocities = None
    if ctx.needs_input_grad[1]:
        nodes, weights, scales = ctx.saved_tensors
        rows = torch.arange(ctx.cache_shape[0], device=nodes.device)[:, None, None]
        totals = torch.where(nodes == rows, weights, 0.0).sum(1)  # [N, 1] or [N, B]
        of_velocities = bridge_cotangents(g, g, totals, torch.zeros_like(totals), dtype=ctx.cache_dtype)
        if scales is not None:
            of_velocities = of_velocities * scales.reshape(scales.shape + (1,) * (g.dim() - 1)).to(ctx.cache_dtype)
    return g, of_velocities, None, None, None


def _keep_weights(ctx, inputs, output):
    g, g_x, weights, alphas, _ = inputs
    ctx.save_for_backward(weights, alphas)
    ctx.dtypes = g.dtype, g_x.dtype


def _sum(ctx, gradients):
    """The gradient of bridge_cotangents: weighted sums over the K nodes, over which it spread g and g_x."""
    weights, alphas = ctx.saved_tensors
    nodes, gradients = torch.arange(len(weights), device=weights.device), gradients.contiguous()
    of_g, of_g_x = (
        quadrature_update(gradients.new_zeros(gradients.shape[1:], dtype=dtype), gradients, nodes, table)
        if needed
        else None
        for needed, dtype, table in zip(ctx.needs_input_grad[:2], ctx.dtypes, (weights, weights * alphas), strict=True)
    )
    return of_g, of_g_x, None, None, None


sum_op.differentiate(_spread, _keep_rule)
spread_op.differentiate(_sum, _keep_weights)
