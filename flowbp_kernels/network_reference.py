"""The ops of a network in plain PyTorch: the ground truth of the faster backends, and what runs where none of them can.

Row statistics and sums run in float32, or in float64 when a tensor is float64; each result is rounded once to the dtype
to which PyTorch promotes what it is made of. A backward is written as its formula, so that every backend computes the
same one. The file of each op has its contract, and checks what arrives here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flowbp_kernels.arguments import accumulation_dtype

# -- modulation.py: x, y [B, T, D]; gate, shift, scale [B or 1, D] or [B or 1, 1, D]; weight [D] -----------------------


def modulation(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """s = x + gate y, rounded; n = norm(s);  (s, n weight (1 + scale) + shift, n weight (1 + scale_2) + shift_2)

    norm is "layer", "rms" or None. What is None takes no part: s is x without a gate and is not returned then.
    """
    wide = accumulation_dtype(*(t for t in (x, gate, y, weight, shift, scale, shift_2, scale_2) if t is not None))
    total = None
    if gate is not None and y is not None:
        total = (x.to(wide) + row(gate, wide) * y.to(wide)).to(promoted(x, gate, y))
        x = total
    if norm is None:
        return total, None, None
    normalized, _ = normalize(x.to(wide), norm, eps)
    if weight is not None:
        normalized = normalized * weight.to(wide)

    def modulated(shift, scale):
        out = normalized if scale is None else normalized * (1 + row(scale, wide))
        return (out if shift is None else out + row(shift, wide)).to(promoted(x, weight, shift, scale))

    return total, modulated(shift, scale), None if scale_2 is None else modulated(shift_2, scale_2)


def modulation_backward(
    g_total: Tensor | None,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradients of s and of both outputs, with u = weight (g (1 + scale) + g_2 (1 + scale_2)):

    of x:                  d = g_total + rstd (u - mean u - n mean(u n)), without mean u for RMS; without a norm g_total
                           itself, which is not returned
    of y:                  gate d
    sums over T [R, B, D]: of_modulation: g n, and g for a LayerNorm; the same of g_2;  with y: d y
    """
    present = [t for t in (g_total, g, g_2, s, gate, y, weight, scale, scale_2) if t is not None]
    wide, sums = accumulation_dtype(*present), []
    of_s = None if g_total is None else g_total.to(wide)
    if s is not None and norm is not None:
        normalized, rstd = normalize(s.to(wide), norm, eps)
        u = None
        for cotangent, factor in ((g, scale), (g_2, scale_2)):
            if cotangent is None:
                continue
            cotangent = cotangent.to(wide)
            if of_modulation:
                sums.append((cotangent * normalized).sum(1))
                if norm == "layer":
                    sums.append(cotangent.sum(1))
            part = cotangent if factor is None else cotangent * (1 + row(factor, wide))
            u = part if u is None else u + part
        assert u is not None
        if weight is not None:
            u = u * weight.to(wide)
        within = u - normalized * (u * normalized).mean(-1, keepdim=True)
        if norm == "layer":
            within = within - u.mean(-1, keepdim=True)
        of_s = rstd * within if of_s is None else of_s + rstd * within
    assert of_s is not None
    if y is not None:
        sums.append((of_s * y.to(wide)).sum(1))
    of_x = None if s is None else of_s.to(s.dtype)
    of_y = None if gate is None else (row(gate, wide) * of_s).to(y_dtype)
    return of_x, of_y, torch.stack(sums) if sums else None


def normalize(s: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """(n, rstd): (s - mean s) rstd with rstd = 1 / sqrt(var s + eps), or s rstd with 1 / sqrt(mean s^2 + eps)."""
    if norm == "layer":
        normalized, _, rstd = torch.native_layer_norm(s, s.shape[-1:], None, None, eps)
        return normalized, rstd
    rstd = rsqrt_mean_square(s, eps)
    return s * rstd, rstd


def rsqrt_mean_square(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def row(table: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, D] or [B or 1, 1, D] as [B or 1, 1, D], to go with [B, T, D]."""
    return (table if table.dim() == 3 else table[:, None]).to(dtype)


def promoted(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype to which PyTorch promotes these tensors."""
    dtype = first.dtype
    for other in others:
        if other is not None and other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


# -- qk_norm: x [B, T, H, d] of each stream, weight [d] or None, to be joined along T ----------------------------------


def qk_norm(streams: Sequence[Tensor], weights: Sequence[Tensor | None], rope: Tensor | None, eps: float) -> Tensor:
    """R (weight * x / rms(x)) of every stream, joined along T   [B, T_total, H, d] in the streams' dtype"""
    dtype = accumulation_dtype(*streams, *(w for w in weights if w is not None))
    normed = []
    for x, weight in zip(streams, weights, strict=True):
        x = x.to(dtype)
        x = x * rsqrt_mean_square(x, eps)
        normed.append(x if weight is None else x * weight.to(dtype))
    joint = torch.cat(normed, 1)
    if rope is not None:
        joint = _rotate(joint, *rope.to(dtype))
    return joint.to(streams[0].dtype)


def qk_norm_backward(
    g: Tensor, streams: Sequence[Tensor], weights: Sequence[Tensor | None], rope: Tensor | None, eps: float
) -> tuple[list[Tensor], list[Tensor | None]]:
    """With n = x / rms(x) and h = R^T g: of x  (h weight - n mean(h weight n)) / rms(x), of weight  sum h n."""
    dtype = accumulation_dtype(*streams, *(w for w in weights if w is not None))
    g = g.to(dtype)
    if rope is not None:
        cos, sin = rope.to(dtype)
        g = _rotate(g, cos, -sin.flip(-1))  # R^T
    of_streams, of_weights = [], []
    for h, x, weight in zip(g.split([x.shape[1] for x in streams], 1), streams, weights, strict=True):
        x, x_dtype = x.to(dtype), x.dtype
        rstd = rsqrt_mean_square(x, eps)
        n = x * rstd
        of_weights.append(None if weight is None else (h * n).sum((0, 1, 2)).to(weight.dtype))
        h = h if weight is None else h * weight.to(dtype)
        of_streams.append(((h - n * (h * n).mean(-1, keepdim=True)) * rstd).to(x_dtype).contiguous())
    return of_streams, of_weights


def rotation(cos: Tensor, sin: Tensor | None) -> Tensor:
    """Cosines and sines [2, 1 or B, T, 1, d/2, 2] of [1 or B, T, d] each, or of one table of pairs (cosine, sine), in
    which both coordinates of a pair share an angle.
    """
    cos = cos.unflatten(-1, (-1, 2)).unsqueeze(2)
    if sin is None:
        return cos.movedim(-1, 0).unsqueeze(-1).expand(2, *cos.shape)
    return torch.stack([cos, sin.unflatten(-1, (-1, 2)).unsqueeze(2)])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R x: every pair (x_0, x_1) of neighbours becomes (cos_0 x_0 - sin_0 x_1, cos_1 x_1 + sin_1 x_0)."""
    pairs = x.unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    return (cos * pairs + sin * torch.stack([-second, first], -1)).flatten(-2)


# -- activations: [..., M], behind a prefix [..., P] or None -----------------------------------------------------------


def swiglu(gate: Tensor, value: Tensor, prefix: Tensor | None) -> Tensor:
    """[prefix, silu(gate) * value]   [..., P + M] in gate's dtype"""
    dtype = accumulation_dtype(gate)
    return _behind(prefix, (functional.silu(gate.to(dtype)) * value.to(dtype)).to(gate.dtype))


def swiglu_backward(g: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(gate): of gate  g value s (1 + gate (1 - s)), of value  g gate s."""
    dtype = accumulation_dtype(gate)
    g, x = g.to(dtype), gate.to(dtype)
    of_gate, of_value = torch.ops.aten.silu_backward(g * value.to(dtype), x), g * functional.silu(x)
    return of_gate.to(gate.dtype).contiguous(), of_value.to(value.dtype).contiguous()


def gelu(x: Tensor, prefix: Tensor | None) -> Tensor:
    """[prefix, x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2]   [..., P + M] in x's dtype. PyTorch's own kernel
    computes a half-precision x in float32.
    """
    return _behind(prefix, functional.gelu(x, approximate="tanh"))


def gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh").contiguous()


def _behind(prefix: Tensor | None, x: Tensor) -> Tensor:
    return x.contiguous() if prefix is None else torch.cat([prefix, x], -1)
