"""The ops between a transformer's GEMMs, at the sizes of its blocks, beside what diffusers and peft run instead."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import flowbp_kernels
from flowbp_kernels.bench.case import DTYPES, Case, Problem, bytes_of, draw

RANK = 32


def modulated_layer_norm(case: Case, device: str) -> Problem:
    x, shift, scale = _tokens(case, device), *_rows(case, device, 2)

    def eager(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def ours(x, shift, scale):
        return flowbp_kernels.modulated_layer_norm(x, shift, scale)

    return _problem((x, shift, scale), ours, eager, writes=(x,), keeps=(x, scale))


def modulated_rms_norm(case: Case, device: str) -> Problem:
    x, (scale, weight) = _tokens(case, device), _rows(case, device, 2)
    weight = weight[0].clone()

    def eager(x, weight, scale):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5) * (1 + scale[:, None])

    def ours(x, weight, scale):
        return flowbp_kernels.modulated_rms_norm(x, weight, scale, eps=1e-5)

    return _problem((x, weight, scale), ours, eager, writes=(x,), keeps=(x, weight, scale))


def gated_residual(case: Case, device: str) -> Problem:
    residual, y, (gate,) = _tokens(case, device), _tokens(case, device), _rows(case, device, 1)

    def eager(residual, gate, y):
        return residual + gate[:, None] * y

    inputs = residual, gate, y
    return _problem(inputs, flowbp_kernels.gated_residual, eager, writes=(residual,), keeps=(gate, y))


def gated_residual_layer_norm(case: Case, device: str) -> Problem:
    residual, y, rows = _tokens(case, device), _tokens(case, device), _rows(case, device, 3)

    def eager(residual, gate, y, shift, scale):
        total = residual + gate[:, None] * y
        return total, F.layer_norm(total, total.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    inputs = residual, rows[0], y, *rows[1:]
    keeps, ours = (residual, rows[0], y, rows[2]), flowbp_kernels.gated_residual_layer_norm
    return _problem(inputs, ours, eager, writes=(residual, residual), keeps=keeps)


def qk_norm(case: Case, device: str) -> Problem:
    """Queries and keys of an image and of a prompt of a third of its length, joined; in FLUX's blocks also rotated."""
    tokens = case.shape[1]
    streams = [draw(case, device)[:, : tokens if image else max(1, tokens // 3)] for image in (1, 1, 0, 0)]
    weights = [_like(case, device, case.shape[-1:]) for _ in range(4)]
    total, width = streams[0].shape[1] + streams[2].shape[1], case.shape[-1]
    angles = torch.rand(total, width // 2, device=device).repeat_interleave(2, 1)
    rope = (angles.cos(), angles.sin()) if case.latent == "flux-block" else None

    def eager(*tensors):
        q, k, q_2, k_2, *weights = tensors
        normed = [F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in zip((q, k, q_2, k_2), weights, strict=True)]
        return tuple(_rotated(torch.cat(pair, 1), rope) for pair in (normed[::2], normed[1::2]))

    def ours(*tensors):
        q, k, q_2, k_2, w_q, w_k, w_q_2, w_k_2 = tensors
        return flowbp_kernels.qk_norm((q, q_2), (k, k_2), (w_q, w_q_2), (w_k, w_k_2), rope)

    return _problem((*streams, *weights), ours, eager, writes=streams, keeps=(*streams, *weights, *(rope or ())))


def swiglu(case: Case, device: str) -> Problem:
    projected = torch.cat([_tokens(case, device) for _ in range(4)], -1)

    def eager(projected):
        gate, value = projected.chunk(2, -1)
        return F.silu(gate) * value

    def ours(projected):
        return flowbp_kernels.swiglu(*projected.chunk(2, -1))

    half = projected.chunk(2, -1)[0]
    return _problem((projected,), ours, eager, writes=(half,), keeps=(projected,))


def gelu(case: Case, device: str) -> Problem:
    """Behind the attention's output, as in FLUX's single blocks. The gradient of that is a view."""
    x, prefix = torch.cat([_tokens(case, device) for _ in range(4)], -1), _tokens(case, device)

    def eager(x, prefix):
        return torch.cat([prefix, F.gelu(x, approximate="tanh")], -1)

    def ours(x, prefix):
        return flowbp_kernels.gelu(x, prefix=prefix)

    return _problem((x, prefix), ours, eager, writes=(x, prefix), keeps=(x,), leaves=(0,))


def lora_linear(case: Case, device: str) -> Problem:
    """Beside the layer of peft, whose float32 branch reads a float32 copy of the input. The layer is frozen."""
    x = _tokens(case, device)
    size = x.shape[-1]
    weight, bias = _like(case, device, (size, size)) / size**0.5, _like(case, device, (size,))
    a, b = torch.randn(RANK, size, device=device) / size**0.5, torch.randn(size, RANK, device=device) / RANK**0.5

    def eager(x, weight, bias, a, b):
        return (F.linear(x, weight, bias) + F.linear(F.linear(x.to(a.dtype), a), b)).to(x.dtype)

    def narrow(x, weight, bias, a, b):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    inputs, keeps, leaves = (x, weight, bias, a, b), (x, weight, a, b), (0, 3, 4)
    return _problem(inputs, flowbp_kernels.lora_linear, eager, (x,), keeps, leaves, narrow)


OPS: dict[str, Callable[[Case, str], Problem]] = {
    op.__name__: op
    for op in (
        modulated_layer_norm,
        modulated_rms_norm,
        gated_residual,
        gated_residual_layer_norm,
        qk_norm,
        swiglu,
        gelu,
        lora_linear,
    )
}


def _problem(
    inputs: Sequence[Tensor],
    ours: Callable,
    eager: Callable,
    writes: Sequence[Tensor],
    keeps: Sequence[Tensor],
    leaves: Sequence[int] | None = None,
    to_compile: Callable | None = None,
) -> Problem:
    """writes: tensors like the outputs.  keeps: what backward reads beside the outputs' gradients."""
    of = tuple(range(len(inputs)) if leaves is None else leaves)
    traffic = bytes_of(forward=(*inputs, *writes), backward=(*writes, *keeps, *(inputs[n] for n in of)))

    def wide(*tensors):
        """In float32, rounded once: the compiler drops the casts between the ops of a chain."""
        result = eager(*(t.float() for t in tensors))
        dtype = tensors[0].dtype
        return tuple(t.to(dtype) for t in result) if isinstance(result, tuple) else result.to(dtype)

    return Problem(tuple(inputs), ours, ours, to_compile or wide, {"eager": eager}, of, traffic)


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """x [B, T, H, d], its neighbouring features rotated in float32, as diffusers does."""
    if rope is None:
        return x
    cos, sin = (table[None, :, None] for table in rope)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _tokens(case: Case, device: str) -> Tensor:
    """[B, T, D] of a block: all heads side by side."""
    return draw(case, device).flatten(2)


def _rows(case: Case, device: str, count: int) -> tuple[Tensor, ...]:
    """Rows [B, D] of a modulation."""
    return tuple(draw(case, device)[:, 0].flatten(1) for _ in range(count))


def _like(case: Case, device: str, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, dtype=DTYPES[case.dtype], device=device)
