"""Random problems for the modulated norms and gated residuals, each beside what diffusers' blocks do in its place."""

import torch
from torch.nn import functional as F

from flowbp_kernels.modulation import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def rows(row):
    """[B, D] or [B, 1, D] as [B, 1, D]."""
    return row if row.dim() == 3 else row[:, None]


def layer_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + rows(scale)) + rows(shift)


def rms_norm(x, weight=None, scale=None):
    """As diffusers writes it: the statistic in float32 at least, the product in the network's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalized = (x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    normalized = normalized if weight is None else normalized * weight
    return normalized if scale is None else normalized * (1 + rows(scale))


def eager_residual_norm(residual, gate, y, shift, scale):
    total = residual + rows(gate) * y
    return total, layer_norm(total, shift, scale)


# op, what diffusers' blocks do in its place, and its arguments: x [B, T, D], r a row by sample, w a weight [D].
CASES = {
    "layer norm": (modulated_layer_norm, layer_norm, "xrr"),
    "layer norm, twice": (
        modulated_layer_norm,
        lambda x, a, b, c, d: (layer_norm(x, a, b), layer_norm(x, c, d)),
        "xrrrr",
    ),
    "RMS norm": (lambda *a: modulated_rms_norm(*a, eps=EPS), rms_norm, "xwr"),
    "RMS norm, no scale": (lambda *a: modulated_rms_norm(*a, eps=EPS), rms_norm, "xw"),
    "RMS norm, no weight": (
        lambda x, scale: modulated_rms_norm(x, None, scale, eps=EPS),
        lambda x, scale: rms_norm(x, None, scale),
        "xr",
    ),
    "gated residual": (gated_residual, lambda residual, gate, y: residual + rows(gate) * y, "xrx"),
    "gated residual, layer norm": (gated_residual_layer_norm, eager_residual_norm, "xrxrr"),
}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(kinds, shape, dtype=torch.float64, row="[B, D]"):
    batch, _, size = shape
    shapes = {"[B, D]": (batch, size), "[1, D]": (1, size), "[B, 1, D]": (batch, 1, size), "[1, 1, D]": (1, 1, size)}
    shapes = {"x": shape, "r": shapes[row], "w": (size,)}
    return [draw(*shapes[kind], dtype=dtype, seed=seed).requires_grad_() for seed, kind in enumerate(kinds)]


def values_and_gradients(op, inputs, dtype=None):
    """Every output, then the gradient of every input; cotangents are alike for all dtypes."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [draw(*out.shape, seed=90 + i).bfloat16().to(out.dtype) for i, out in enumerate(outputs)]
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def wide(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]
