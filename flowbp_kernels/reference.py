"""Every op in plain PyTorch: the ground truth of the faster backends, and what runs where none of them can.

Sums run in float32, or in float64 when a tensor is float64, one node after the other; the result is rounded once.
Shapes: B samples of any shape S. N cached velocities, of which a rule reads K. Weights are in sigma units (signed).
A coefficient of zero cuts: what it would multiply takes no part, so that 0 * NaN is 0, forward and backward.
Every op has a gradient, raises ValueError for an input outside its contract, and can be traced by torch.compile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def quadrature_update(
    x: Tensor, velocities: Tensor, nodes: Tensor | Sequence[int], weights: Tensor | Sequence[float]
) -> Tensor:
    """x + sum_k weights[k] velocities[nodes[k]]: the contract is at flowbp_kernels.quadrature_update."""
    nodes, weights = quadrature_tables(x, velocities, nodes, weights)
    dtype = accumulation_dtype(x, velocities)
    nodes, weights = nodes.to(x.device), weights.to(x.device, dtype)
    samples = torch.arange(x.shape[0], device=x.device)
    total = x.to(dtype)
    for node, weight in zip(nodes, weights, strict=True):  # each [] or [B]
        total = total + _scale(velocities[node.expand_as(samples), samples].to(dtype), weight)
    return total.to(x.dtype)


def cfg_euler_step(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: float, h: float | Tensor
) -> tuple[Tensor, Tensor]:
    """One Euler step of classifier-free guidance: v = v_u + guidance (v_c - v_u),  x_next = x + h v.

    x, v_cond, v_uncond: [B, *S], any float dtype; v_cond and v_uncond share one. v_uncond None: no guidance, v = v_c.
    h: sigma_next - sigma, a number or a 0-dimensional tensor.
    Returns x_next in x.dtype and v in v_cond.dtype, both [B, *S]. x_next uses v as rounded to that dtype, so that a
    replay which reads v from a cache meets the same x_next.
    Gradient: 1 to x, guidance and 1 - guidance (times h, for x_next) to v_cond and v_uncond; none to guidance and h.
    Equivalent to  v = (v_u.float() + guidance * (v_c.float() - v_u.float())).to(v_c.dtype);  x_next = x + h * v
    """
    _check_float("x", x)
    for name, v in (("v_cond", v_cond), ("v_uncond", v_uncond)):
        if v is not None:
            _check_float(name, v)
            _check_shape(name, v, x, "x")
    if v_uncond is not None and v_cond.dtype != v_uncond.dtype:
        raise ValueError(f"v_cond is {v_cond.dtype} and v_uncond {v_uncond.dtype}; they must share one dtype: cast one")
    if isinstance(h, Tensor):
        if h.dim() != 0:
            raise ValueError(f"h must be a number or a 0-dimensional tensor, not of shape {tuple(h.shape)}")
        h = h.detach()
    dtype = accumulation_dtype(x, v_cond)
    velocity = v_cond
    if v_uncond is not None:
        conditional, unconditional = v_cond.to(dtype), v_uncond.to(dtype)
        velocity = (unconditional + guidance * (conditional - unconditional)).to(v_cond.dtype)
    return (x.to(dtype) + h * velocity.to(dtype)).to(x.dtype), velocity


def bridge_cotangents(
    g: Tensor,
    g_x: Tensor,
    weights: Tensor | Sequence[float],
    alphas: Tensor | Sequence[float],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cotangents of all replayed nodes: c_k = weights[k] (g + alphas[k] g_x).

    g: [B, *S], the reward's gradient at the endpoint.  g_x: [B, *S], what comes back through the bridge node's input.
    weights, alphas: [K] or [K, B]; alphas[k] = 0 for a node at or after the bridge, which g_x does not reach.
    Returns [K, B, *S] in `dtype` (default: g.dtype), the network's, rounded once.
    Gradient: weights[k] to g, weights[k] alphas[k] to g_x; none to weights and alphas.
    Equivalent to  weights[:, None] * (g + alphas[:, None] * g_x)
    """
    _check_float("g", g)
    _check_float("g_x", g_x)
    _check_shape("g_x", g_x, g, "g")
    weights, alphas = _table("weights", weights, g), _table("alphas", alphas, g)
    if weights.shape[0] != alphas.shape[0]:
        raise ValueError(f"weights has {weights.shape[0]} rows and alphas {alphas.shape[0]}; each needs one row a node")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, not {dtype}")
    total = accumulation_dtype(g, g_x)
    weights, alphas = weights.to(g.device, total), alphas.to(g.device, total)
    nodes = [_scale(g.to(total) + _scale(g_x.to(total), a), w) for w, a in zip(weights, alphas, strict=True)]
    return (torch.stack(nodes) if nodes else g.new_empty(0, *g.shape)).to(dtype or g.dtype)


def straight_through(value: Tensor, surrogate: Tensor, scale: float = 1.0) -> Tensor:
    """The value of one tensor with the gradient, times `scale`, of another.

    value, surrogate: one shape, any float dtypes. Returns `value` bit for bit, in value.dtype.
    Gradient: scale to surrogate; none to value. scale multiplies the backward only; scale = 0 cuts.
    Equivalent to  value.detach() + scale * (surrogate - surrogate.detach()), without its rounding.
    """
    _check_float("value", value)
    _check_float("surrogate", surrogate)
    _check_shape("value", value, surrogate, "surrogate")
    return _StraightThrough.apply(value, surrogate, scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, surrogate, scale):
        ctx.scale, ctx.dtype = scale, surrogate.dtype
        return value.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        scaled = torch.zeros_like(gradient) if ctx.scale == 0 else ctx.scale * gradient
        return None, scaled.to(ctx.dtype), None


def leap_residuals(prediction: Tensor, reference: Tensor) -> Tensor:
    """Per-sample mean absolute gap between where a leap lands and the cached latent it aims at: the d_j, d_0 of a plan.

    prediction, reference: [B, *S], any float dtypes, S not empty. Returns [B] float32 (float64 if either is).
    Gradient: +-1 / |S| to prediction and reference, 0 where they meet.
    Equivalent to  (prediction.float() - reference.float()).abs().flatten(1).mean(1)
    """
    _check_float("prediction", prediction)
    _check_float("reference", reference)
    _check_shape("prediction", prediction, reference, "reference")
    if reference.shape[1:].numel() == 0:
        raise ValueError(f"a sample of shape {tuple(reference.shape[1:])} has no elements to take a mean over")
    dtype = accumulation_dtype(prediction, reference)
    gap = (prediction.to(dtype) - reference.to(dtype)).abs()
    return gap.reshape(gap.shape[0], reference.shape[1:].numel()).mean(1)


def quadrature_tables(
    x: Tensor, velocities: Tensor, nodes: Tensor | Sequence[int], weights: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Checks a quadrature_update; returns nodes (int64) and weights (no gradient) as CPU tensors [K] or [K, B]."""
    _check_float("x", x)
    _check_float("velocities", velocities)
    if x.dim() < 1 or velocities.shape[1:] != x.shape:
        raise ValueError(
            f"velocities must be [N, *x.shape], the cache of a rollout of x; "
            f"got {tuple(velocities.shape)} for x of shape {tuple(x.shape)}"
        )
    if velocities.device != x.device:
        raise ValueError(f"x is on {x.device} and velocities on {velocities.device}; move them together")
    nodes = _table("nodes", nodes, x)
    if nodes.dtype.is_floating_point and nodes.numel():
        raise ValueError(f"nodes must be integers, not {nodes.dtype}")
    nodes, weights = nodes.long(), _table("weights", weights, x)
    if nodes.shape[0] != weights.shape[0]:
        raise ValueError(f"nodes has {nodes.shape[0]} rows and weights {weights.shape[0]}; each needs one row a node")
    if not torch.compiler.is_compiling() and nodes.numel():  # a traced index is checked when the compiled code runs
        low, high = nodes.aminmax()
        if low < 0 or high >= velocities.shape[0]:
            bad = int(low if low < 0 else high)
            raise ValueError(f"node {bad} is not in the cache; its {velocities.shape[0]} velocities count from 0")
    return nodes, weights


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _scale(tensor: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * tensor [B, *S] for a coefficient [] or [B]; exactly zero where the coefficient is."""
    coefficient = coefficient.reshape(coefficient.shape + (1,) * (tensor.dim() - 1))
    return coefficient * torch.where(coefficient == 0, 0, tensor)


def _table(name: str, values: Tensor | Sequence, x: Tensor) -> Tensor:
    """`values` as a detached, contiguous CPU tensor [K] or [K, B], B being the batch of x."""
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{name} is on {values.device}; it travels by value, without a sync: pass {name}.cpu()")
        table = values.detach().contiguous()
    else:
        table = torch.tensor(values, dtype=None if name == "nodes" else torch.float64)
    if table.dim() not in (1, 2) or (table.dim() == 2 and table.shape[1] != x.shape[0]):
        raise ValueError(f"{name} must be [K] or [K, B] with B = {x.shape[0]}, not of shape {tuple(table.shape)}")
    return table


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must have a float dtype, not {tensor.dtype}; convert it with .float()")


def _check_shape(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; they must be equal"
        )
