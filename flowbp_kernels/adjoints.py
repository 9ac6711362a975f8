"""The gradients of quadrature_update, bridge_cotangents and cfg_multistep_step. Each of the first two computes the
gradient of the other, and both parts of the third's come from bridge_cotangents.

quadrature_update   x, v_n  ->  x + sum_n w_n v_n    its gradient, by bridge_cotangents:   g    ->  w_n g for every n
bridge_cotangents   g, g_x  ->  w_n (g + a_n g_x)    its gradient, by quadrature_update:   c_n  ->  sum_n w_n c_n and
                                                                                                    sum_n w_n a_n c_n
"""

import torch
from torch import Tensor

from flowbp_kernels.bridge_cotangents import _op as spread_op
from flowbp_kernels.bridge_cotangents import bridge_cotangents
from flowbp_kernels.cfg_multistep_step import _op as step_op
from flowbp_kernels.quadrature_update import _op as sum_op
from flowbp_kernels.quadrature_update import quadrature_update


def _of_rows(g: Tensor, nodes: Tensor, weights: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Velocity n of sample b gets g times the sum of all weights with which the sample's rule reads that velocity."""
    rows = torch.arange(num_rows, device=nodes.device)[:, None, None]
    totals = torch.where(nodes == rows, weights, 0.0).sum(1)  # [N, 1] or [N, B]
    return bridge_cotangents(g, g, totals, torch.zeros_like(totals), dtype=dtype)


def _keep_rule(ctx, inputs, output):
    _, velocities, nodes, weights, scales = inputs
    ctx.save_for_backward(nodes, weights, scales)
    ctx.num_rows, ctx.cache_dtype = len(velocities), velocities.dtype


def _spread(ctx, g):
    """The gradient of quadrature_update."""
    of_velocities = None
    if ctx.needs_input_grad[1]:
        nodes, weights, scales = ctx.saved_tensors
        of_velocities = _of_rows(g, nodes, weights, ctx.num_rows, ctx.cache_dtype)
        if scales is not None:
            of_velocities = of_velocities * scales.reshape(scales.shape + (1,) * (g.dim() - 1)).to(ctx.cache_dtype)
    return g, of_velocities, None, None, None


def _keep_step(ctx, inputs, output):
    _, v_cond, v_uncond, coefficients, velocities, nodes, weights = inputs
    ctx.save_for_backward(coefficients, nodes, weights)
    ctx.dtype, ctx.is_guided = v_cond.dtype, v_uncond is not None
    if velocities is not None:
        ctx.num_rows, ctx.cache_dtype = len(velocities), velocities.dtype


def _part(ctx, of_x_next, of_velocity):
    """The gradient of cfg_multistep_step. The cotangent of v is of_velocity + h of_x_next: v_cond gets guidance times
    it, and v_uncond 1 - guidance times. Without guidance v is not returned, and v_cond gets h of_x_next.
    """
    (guidance, h), nodes, weights = ctx.saved_tensors
    of_cond = of_uncond = of_velocities = None
    if ctx.is_guided:
        shares = torch.stack([guidance, 1 - guidance])
        of_cond, of_uncond = bridge_cotangents(of_velocity, of_x_next, shares, h.expand(2), dtype=ctx.dtype).unbind()
    elif ctx.needs_input_grad[1]:
        of_cond = bridge_cotangents(of_x_next, of_x_next, h[None], torch.zeros_like(h[None]), dtype=ctx.dtype)[0]
    if ctx.needs_input_grad[4]:
        of_velocities = _of_rows(of_x_next, nodes, weights, ctx.num_rows, ctx.cache_dtype)
    return of_x_next, of_cond, of_uncond, None, of_velocities, None, None


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
step_op.differentiate(_part, _keep_step)
spread_op.differentiate(_sum, _keep_weights)
