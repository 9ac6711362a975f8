"""What conditions a transformer's block on time and text: norms whose result is scaled and shifted by sample (adaptive
layer norm), and residuals that are added through a gate. Each is one pass over the tokens.

All four are parts of one chain, and run the same kernel:

    s = residual + gate y        n = norm(s)        out = n weight (1 + scale) + shift
"""

import torch
from torch import Tensor

from flowbp_kernels import backend, network_reference
from flowbp_kernels.arguments import accumulation_dtype, check_float, check_like, with_whole_rows
from flowbp_kernels.network_reference import promoted
from flowbp_kernels.operators import Recorded

CHUNK = 16  # tokens whose gradients make one partial sum: kTokens in csrc/ops.h


def modulated_layer_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift_2: Tensor | None = None,
    scale_2: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """LN(x) (1 + scale) + shift: a LayerNorm over the last dimension, without weights of its own, modulated by sample.

    x: [B, T, D], any float dtype, D > 0.  shift, scale: [B, D] or [B, 1, D], one row a sample; [1, D] or [1, 1, D], one
    for all; any float dtypes, on x's device.
    shift_2, scale_2: a second modulation of the same norm, or None. Both results then come from one pass over x.
    Returns [B, T, D], or a tuple of two, in the dtype to which the tensors promote. Statistics and arithmetic are in
    float32 (float64 if a tensor is float64); the result is rounded once.
    Gradient: to all tensors, each in its own dtype. Sums over tokens and samples are in float32 (float64), in one fixed
    order: equal inputs give equal bits. Backward keeps x and the scales, no result and no statistic. It has no gradient
    of its own.
    Strides are free, except that a last dimension which is not contiguous is copied.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None], rounded
    """
    _check(x, "x", shift=shift, scale=scale)
    if (shift_2 is None) != (scale_2 is None):
        missing, other = ("shift_2", "scale_2") if shift_2 is None else ("scale_2", "shift_2")
        raise ValueError(f"{missing} is missing: a second modulation takes it with {other}, or leave both out")
    if scale_2 is not None:
        _check(x, "x", shift_2=shift_2, scale_2=scale_2)
    _, out, out_2 = _op(x, None, None, None, shift, scale, shift_2, scale_2, "layer", eps)
    return out if scale_2 is None else (out, out_2)


def modulated_rms_norm(x: Tensor, weight: Tensor | None, scale: Tensor | None = None, *, eps: float) -> Tensor:
    """weight x / rms(x) (1 + scale), with rms(x) = sqrt(mean x^2 + eps) over the last dimension.

    x: [B, T, D], any float dtype, D > 0.  weight: [D], or None for ones.  scale: as in modulated_layer_norm, or None
    for zeros.
    Returns, gradient, strides and errors: as in modulated_layer_norm; backward keeps x, weight and scale.
    Equivalent to  F.rms_norm(x.float(), x.shape[-1:], weight, eps) * (1 + scale[:, None]), rounded
    """
    _check(x, "x", **{} if scale is None else {"scale": scale})
    if weight is not None:
        check_float("weight", weight)
        if weight.shape != x.shape[-1:] or weight.device != x.device:
            raise ValueError(
                f"weight must be [D] = {list(x.shape[-1:])} on {x.device}, one number a feature; got "
                f"{list(weight.shape)} on {weight.device}"
            )
    return _op(x, None, None, weight, None, scale, None, None, "rms", eps)[1]


def gated_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """residual + gate y: what a block's branch adds to its residual, through a gate by sample.

    residual, y: [B, T, D], any float dtypes, on one device.  gate: as scale in modulated_layer_norm.
    Returns [B, T, D] in the dtype to which the tensors promote, computed in float32 (float64 with a float64
    tensor) and rounded once.
    Gradient, strides and errors: as in modulated_layer_norm; backward keeps gate, and y if gate has a gradient.
    Equivalent to  residual + gate[:, None] * y
    """
    check_like("y", y, residual, "residual")
    _check(residual, "residual", gate=gate)
    return _op(residual, gate, y, None, None, None, None, None, None, 0.0)[0]


def gated_residual_layer_norm(
    residual: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(s, LN(s) (1 + scale) + shift) with s = residual + gate y, in one pass.

    Arguments: as in gated_residual and modulated_layer_norm.
    Returns s, rounded to the dtype to which residual, gate and y promote, and the modulated norm of this rounded s, in
    the dtype to which s, shift and scale promote.
    Gradient, strides and errors: as in modulated_layer_norm; backward keeps s, gate and scale, and y if gate has a
    gradient.
    Equivalent to  s = gated_residual(residual, gate, y);  s, modulated_layer_norm(s, shift, scale, eps=eps)
    """
    check_like("y", y, residual, "residual")
    _check(residual, "residual", gate=gate, shift=shift, scale=scale)
    total, out, _ = _op(residual, gate, y, None, shift, scale, None, None, "layer", eps)
    return total, out


def _check(x: Tensor, x_name: str, **rows: Tensor | None) -> None:
    """x is [B, T, D]; each of the rows is [B, D], [1, D], [B, 1, D] or [1, 1, D], on its device."""
    check_float(x_name, x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{x_name} must be [B, T, D] with D > 0: samples, tokens, features; got {list(x.shape)}")
    batch, _, size = x.shape
    for name, row in rows.items():
        assert row is not None
        check_float(name, row)
        shape = row.shape
        if len(shape) not in (2, 3) or shape[-1] != size or shape[0] not in (1, batch) or shape[1:-1].numel() != 1:
            raise ValueError(
                f"{name} must be [B, D], [1, D], [B, 1, D] or [1, 1, D] with B, D = {batch}, {size} of {x_name}; got "
                f"{list(shape)}"
            )
        if row.device != x.device:
            raise ValueError(f"{name} is on {row.device} and {x_name} on {x.device}; move them together")


def _run(x, gate, y, weight, shift, scale, shift_2, scale_2, norm, eps):
    """(s, out, out_2), each None where it is not asked for."""
    tensors = {"x": x, "gate": gate, "y": y, "weight": weight, "shift": shift, "scale": scale}
    runs = backend.select("modulation", in_rows=True, one_dtype=True, **tensors, shift_2=shift_2, scale_2=scale_2)
    if runs == "reference":
        return network_reference.modulation(x, gate, y, weight, shift, scale, shift_2, scale_2, norm, eps)
    outputs = _outputs(x, gate, y, weight, shift, scale, shift_2, scale_2, norm)
    arguments = with_whole_rows(x, gate, y, weight, shift, scale, shift_2, scale_2)
    launch = backend.triton_op("modulation") if runs == "triton" else torch.ops.flowbp_compiled.modulation
    launch(*arguments, norm == "layer", eps, *outputs)
    return outputs


def _outputs(x, gate, y, weight, shift, scale, shift_2, scale_2, norm):
    s = None if gate is None else x.new_empty(x.shape, dtype=promoted(x, gate, y))
    of_norm = x if s is None else s
    out = None if norm is None else x.new_empty(x.shape, dtype=promoted(of_norm, weight, shift, scale))
    out_2 = None if scale_2 is None else x.new_empty(x.shape, dtype=promoted(of_norm, weight, shift_2, scale_2))
    return s, out, out_2


def _run_backward(g_s, g, g_2, s, gate, y, weight, scale, scale_2, norm, eps, y_dtype, of_modulation):
    """The gradients of x and y and the sums over T, each None where it is not asked for."""
    like = g_s if g is None else g
    arguments = g_s, g, g_2, s, gate, y, weight, scale, scale_2
    tensors = {"g": like, "g_s": g_s, "g_2": g_2, "s": s, "gate": gate, "y": y, "weight": weight, "scale": scale}
    runs = backend.select("modulation", in_rows=True, one_dtype=True, **tensors, scale_2=scale_2)
    if runs == "reference":
        return network_reference.modulation_backward(*arguments, norm, eps, y_dtype, of_modulation)
    batch, tokens, size = like.shape
    chunks, rows = -(-tokens // CHUNK), _num_sums(norm, g_2, y, of_modulation)
    of_x = None if s is None else s.new_empty(s.shape)
    of_y = None if gate is None else like.new_empty(like.shape, dtype=y_dtype)
    parts = like.new_empty((rows, batch, chunks, size), dtype=torch.float32) if rows else None
    ops = torch.ops.flowbp_compiled
    launch = backend.triton_op("modulation", "modulation_backward") if runs == "triton" else ops.modulation_backward
    launch(*with_whole_rows(*arguments), norm == "layer", eps, of_modulation, of_x, of_y, parts)
    sums = None if parts is None else parts.squeeze(2) if chunks == 1 else parts.sum(2)
    return of_x, of_y, sums


def _num_sums(norm, g_2, y, of_modulation) -> int:
    """Sums over T: of g n and g for a LayerNorm, of g n for RMS, the same of g_2, and of the gradient of s times y."""
    return of_modulation * (1 + (norm == "layer")) * (1 + (g_2 is not None)) + (y is not None)


def _forward(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    norm: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    s, out, out_2 = _run(x, gate, y, weight, shift, scale, shift_2, scale_2, norm, eps)
    return _or_empty(s, x), _or_empty(out, x), _or_empty(out_2, x)


def _fake(x, gate, y, weight, shift, scale, shift_2, scale_2, norm, eps):
    s, out, out_2 = _outputs(x, gate, y, weight, shift, scale, shift_2, scale_2, norm)
    return _or_empty(s, x), _or_empty(out, x), _or_empty(out_2, x)


def _backward_operator(
    g_s: Tensor | None,
    g: Tensor | None,
    g_2: Tensor | None,
    s: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    scale_2: Tensor | None,
    norm: str | None,
    eps: float,
    y_dtype: torch.dtype | None,
    of_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = g_s, g, g_2, s, gate, y, weight, scale, scale_2, norm, eps, y_dtype, of_modulation
    of_x, of_y, sums = _run_backward(*arguments)
    like = g if g_s is None else g_s
    assert like is not None
    return _or_empty(of_x, like), _or_empty(of_y, like), _or_empty(sums, like)


def _backward_fake(g_s, g, g_2, s, gate, y, weight, scale, scale_2, norm, eps, y_dtype, of_modulation):
    present = [t for t in (g_s, g, g_2, s, gate, y, weight, scale, scale_2) if t is not None]
    like, dtype = present[0], accumulation_dtype(*present)
    rows = _num_sums(norm, g_2, y, of_modulation)
    of_x = None if s is None else s.new_empty(s.shape)
    of_y = None if gate is None else like.new_empty(like.shape, dtype=y_dtype)
    sums = like.new_empty((rows, like.shape[0], like.shape[2]), dtype=dtype) if rows else None
    return _or_empty(of_x, like), _or_empty(of_y, like), _or_empty(sums, like)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _keep(ctx, inputs, output):
    x, gate, y, weight, shift, scale, shift_2, scale_2, ctx.norm, ctx.eps = inputs
    of_gate, ctx.of_modulation = ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:8])
    s = None if ctx.norm is None else x if gate is None else output[0]
    ctx.save_for_backward(s, gate, y if of_gate else None, weight, scale, scale_2)
    ctx.like = [
        None if row is None else (row.shape, row.dtype) for row in (gate, weight, shift, scale, shift_2, scale_2)
    ]
    ctx.y_dtype = None if y is None else y.dtype


def _backward(ctx, g_s, g, g_2):
    s, gate, y, weight, scale, scale_2 = ctx.saved_tensors
    gate_like, weight_like, shift_like, scale_like, shift_2_like, scale_2_like = ctx.like
    g_s, g, g_2 = g_s if gate_like else None, g if ctx.norm else None, g_2 if scale_2_like else None
    arguments = g_s, g, g_2, s, gate, y, weight, scale, scale_2, ctx.norm, ctx.eps, ctx.y_dtype, ctx.of_modulation
    tensors = (g_s, g, g_2, s, gate, y, weight, scale, scale_2)
    run = _backward_op if backend.needs_operator(*tensors) else _run_backward
    of_x, of_y, sums = run(*arguments)
    of_gate = of_weight = of_shift = of_scale = of_shift_2 = of_scale_2 = None
    rows = [] if sums is None else list(sums.unbind())
    if y is not None:
        of_gate = _as_row(rows[-1], gate_like)
    if ctx.of_modulation:
        of_factor, of_term = rows[0], rows[1] if ctx.norm == "layer" else None  # sums of g n and of g
        of_shift, of_scale = _as_row(of_term, shift_like), _as_row(of_factor, scale_like)
        if scale_2_like:
            of_scale_2, of_shift_2 = _as_row(rows[2], scale_2_like), _as_row(rows[3], shift_2_like)
        if weight is not None:
            wide = of_factor.dtype
            if scale is not None:
                of_scale = _as_row(of_factor * weight.to(wide), scale_like)
                of_factor = of_factor * (1 + scale.reshape(-1, scale.shape[-1]).to(wide))
            of_weight = of_factor.sum(0).to(weight_like[1])
    if ctx.norm is None:
        of_x = g_s
    return of_x, of_gate, of_y if gate_like else None, of_weight, of_shift, of_scale, of_shift_2, of_scale_2, None, None


def _as_row(sums: Tensor | None, like) -> Tensor | None:
    """Sums [B, D] as the gradient of a row of this shape and dtype: summed over the samples where it is one for all."""
    if sums is None or like is None:
        return None
    shape, dtype = like
    if shape[0] != sums.shape[0]:
        sums = sums.sum(0)
    if sums.dtype != dtype:
        sums = sums.to(dtype)
    return sums if sums.shape == shape else sums.reshape(shape)


_op = Recorded("modulation", _run, _forward, _fake, _keep, _backward)
_backward_op = torch.library.custom_op("flowbp_kernels::modulation_backward", _backward_operator, mutates_args=())
_backward_op.register_fake(_backward_fake)
