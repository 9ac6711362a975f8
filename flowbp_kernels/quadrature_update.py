"""The quadrature update: one pass over a cache of velocities that carries a latent from one noise level to another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels import backend, reference

OP = "flowbp_kernels::quadrature_update"
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quadrature_update(
    x: Tensor, velocities: Tensor, nodes: Tensor | Sequence[int], weights: Tensor | Sequence[float]
) -> Tensor:
    """x + sum_k weights[k] velocities[nodes[k]], accumulated in float32 (float64 if a tensor is float64).

    x: [B, *S], any float dtype.  velocities: [N, B, *S], any float dtype, on x's device.
    nodes: [K] or [K, B] integers in [0, N), repeats allowed.  weights: [K] or [K, B], sigma units.
    Both are numbers or CPU tensors: they travel by value. [K, B] holds one rule a sample.
    Returns [B, *S] in x.dtype, rounded once. A velocity of weight zero is not read: it may hold NaN.
    Gradient: 1 to x, weights[k] to velocities[nodes[k]]; none to nodes and weights.
    Raises ValueError for shapes, dtypes, devices or nodes outside this contract.
    Equivalent to  (x.float() + torch.einsum("k,k...->...", weights, velocities[nodes].float())).to(x.dtype)
    """
    nodes, weights = reference.quadrature_tables(x, velocities, nodes, weights)
    if backend.select(cpu=_why_not_cpu(x, velocities)) == "reference":
        return reference.quadrature_update(x, velocities, nodes, weights)
    return torch.ops.flowbp_kernels.quadrature_update(x, velocities, nodes, weights.float())


def _why_not_cpu(x: Tensor, velocities: Tensor) -> str:
    """What keeps the compiled CPU op from these tensors; empty if nothing does."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in COMPILED_DTYPES or velocities.dtype not in COMPILED_DTYPES:
        return f"x is {x.dtype} and velocities {velocities.dtype}; it takes float32, bfloat16 and float16"
    if not (x.is_contiguous() and velocities.is_contiguous()):
        return "x and velocities must be contiguous"
    return ""


# The operator exists with or without a compiled backend; csrc/ registers one kernel for it per kind of device.
torch.library.define(
    OP, "(Tensor x, Tensor velocities, Tensor nodes, Tensor weights) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


@torch.library.register_fake(OP)
def _fake(x, velocities, nodes, weights):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    x, velocities, nodes, weights = inputs
    ctx.save_for_backward(nodes, weights)
    ctx.cache_shape, ctx.cache_dtype = velocities.shape, velocities.dtype


def _backward(ctx, gradient):
    """Gradient 1 to x; velocity n of sample b gets the sum of the weights with which that sample's rule reads it."""
    of_velocities = None
    if ctx.needs_input_grad[1]:
        nodes, weights = (t if t.dim() == 2 else t[:, None].expand(-1, gradient.shape[0]) for t in ctx.saved_tensors)
        total = weights.new_zeros(ctx.cache_shape[:2]).scatter_add(0, nodes, weights).to(gradient.device)
        total = total.reshape(total.shape + (1,) * (gradient.dim() - 1))
        of_velocities = (total * torch.where(total == 0, 0, gradient.float())).to(ctx.cache_dtype)
    return gradient, of_velocities, None, None


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)
