"""The ops between a transformer's matrix products in plain PyTorch: the ground truth of the faster backends, and what
runs where none of them can.

Statistics and arithmetic are in float32, or in float64 where a tensor is float64; a result is rounded once. A backward
takes what its forward took, and computes the statistics again. The file of each op has its contract, and checks what
arrives here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flowbp_kernels.arguments import accumulation_dtype

# -- qk_norm: x [B, T, H, d] of each stream, weight [d] or None, to be joined along T ----------------------------------


def qk_norm(streams: Sequence[Tensor], weights: Sequence[Tensor | None], rope: Tensor | None, eps: float) -> Tensor:
    """R (weight * x / rms(x)) of every stream, joined along T   [B, T_total, H, d] in the streams' dtype"""
    dtype = accumulation_dtype(*streams, *(w for w in weights if w is not None))
    normed = []
    for x, weight in zip(streams, weights, strict=True):
        x = x.to(dtype)
        x = x * _rstd(x, eps)
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
        rstd = _rstd(x, eps)
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


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


# -- activations: [..., M], behind a prefix [..., P] or None -----------------------------------------------------------


def swiglu(gate: Tensor, value: Tensor, prefix: Tensor | None) -> Tensor:
    """[prefix, silu(gate) * value]   [..., P + M] in gate's dtype"""
    dtype = accumulation_dtype(gate)
    return _behind(prefix, (functional.silu(gate.to(dtype)) * value.to(dtype)).to(gate.dtype))


def swiglu_backward(g: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(gate): of gate  g value s (1 + gate (1 - s)), of value  g gate s."""
    dtype = accumulation_dtype(gate)
    g, gate, value, narrow = g.to(dtype), gate.to(dtype), value.to(dtype), gate.dtype
    s = torch.sigmoid(gate)
    of_gate, of_value = g * value * s * (1 + gate * (1 - s)), g * gate * s
    return of_gate.to(narrow).contiguous(), of_value.to(narrow).contiguous()


def gelu(x: Tensor, prefix: Tensor | None) -> Tensor:
    """[prefix, x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2]   [..., P + M] in x's dtype. PyTorch's own kernel
    computes a half-precision x in float32.
    """
    return _behind(prefix, functional.gelu(x, approximate="tanh"))


def gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh").contiguous()


def _behind(prefix: Tensor | None, x: Tensor) -> Tensor:
    return x.contiguous() if prefix is None else torch.cat([prefix, x], -1)
