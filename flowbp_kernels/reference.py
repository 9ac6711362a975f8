"""Every op in plain PyTorch: the ground truth of the faster backends, and what runs where none of them can.

Sums run in float32, or in float64 when a tensor is float64, one node after the other; the result is rounded once.
Shapes: B samples [B, *S]; N cached velocities [N, B, *S], of which a rule reads K. nodes and weights: [K, 1] or [K, B].
A coefficient of zero cuts: what it would multiply takes no part, so that 0 * NaN is 0. With any other coefficient, a
node that is not cached gives NaN.
The file of each op has its contract and its gradient, and checks what arrives here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels.arguments import accumulation_dtype


def quadrature_update(
    x: Tensor, velocities: Tensor, nodes: Tensor, weights: Tensor, scales: Tensor | None = None
) -> Tensor:
    """x + sum_k weights[k] scales[n_k] velocities[n_k]   [B, *S] in x.dtype"""
    return _integrate(x, velocities, nodes, weights, scales).to(x.dtype)


def leap_residuals(
    x_k: Tensor,
    x_j: Tensor,
    x_end: Tensor,
    velocities: Tensor,
    nodes: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mean |x_k + sum_k weights[0][k] v_k - x_j| and mean |x_j + sum_k weights[1][k] v_k - x_end|   [2, B]; then where
    both leaps land   [2, B, *S]
    """
    predictions = torch.stack(
        [_integrate(x, velocities, nodes, w, scales) for x, w in zip((x_k, x_j), weights, strict=True)]
    )
    gaps = (predictions - torch.stack([x_j, x_end])).abs()
    return gaps.reshape(2, len(x_k), x_k.shape[1:].numel()).mean(2), predictions


def cfg_multistep_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float | Tensor,
    h: float | Tensor,
    velocities: Tensor | None,
    nodes: Tensor | None,
    weights: Tensor | None,
    velocity_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond), rounded to velocity_dtype; x + sum_k weights[k] velocities[n_k] +
    h v in x.dtype, and v. velocities, nodes and weights None: there is no sum, as in an Euler step.
    """
    dtype = accumulation_dtype(x, v_cond, *([] if velocities is None else [velocities]))
    velocity = v_cond.to(dtype)
    if v_uncond is not None:
        velocity = v_uncond.to(dtype) + guidance * (velocity - v_uncond.to(dtype))
    velocity = velocity.to(velocity_dtype)
    total = x.to(dtype)
    if velocities is not None and nodes is not None and weights is not None:
        total = _integrate(total, velocities, nodes, weights, None)
    return (total + h * velocity.to(dtype)).to(x.dtype), velocity


def bridge_cotangents(g: Tensor, g_x: Tensor, weights: Tensor, alphas: Tensor, dtype: torch.dtype) -> Tensor:
    """weights[k] (g + alphas[k] g_x)   [K, B, *S] in dtype"""
    wide = accumulation_dtype(g, g_x)
    weights, alphas = weights.to(g.device, wide), alphas.to(g.device, wide)
    seeds = [_scale(g.to(wide) + _scale(g_x.to(wide), a), w) for w, a in zip(weights, alphas, strict=True)]
    return torch.stack(seeds).to(dtype) if seeds else g.new_empty(0, *g.shape, dtype=dtype)


def _integrate(x: Tensor, velocities: Tensor, nodes: Tensor, weights: Tensor, scales: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x, velocities)
    nodes, weights = nodes.to(x.device), weights.to(x.device, dtype)
    cached = (nodes >= 0) & (nodes < velocities.shape[0])
    nodes, weights = torch.where(cached, nodes, 0), torch.where(cached | (weights == 0), weights, torch.nan)
    samples = torch.arange(x.shape[0], device=x.device)
    total = x.to(dtype)
    for node, weight in zip(nodes, weights, strict=True):  # each [1] or [B]
        node = node.expand_as(samples)
        velocity = velocities[node, samples].to(dtype)
        if scales is not None:
            weight = torch.where(weight == 0, 0, weight * scales[node, samples])
        total = total + _scale(velocity, weight)
    return total


def _scale(tensor: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * tensor [B, *S] for a coefficient [1] or [B]; exactly zero where the coefficient is."""
    coefficient = coefficient.reshape(coefficient.shape + (1,) * (tensor.dim() - 1))
    return coefficient * torch.where(coefficient == 0, 0, tensor)
