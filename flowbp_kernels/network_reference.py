"""The ops of a network in plain PyTorch: the ground truth of the faster backends, and what runs where none of them can.

Row statistics and sums run in float32, or in float64 when a tensor is float64; each result is rounded once to the dtype
to which PyTorch promotes what it is made of. A backward is written as its formula, so that every backend computes the
same one. The file of each op has its contract, and checks what arrives here.
"""

import torch
from torch import Tensor

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
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s * rstd, rstd


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
