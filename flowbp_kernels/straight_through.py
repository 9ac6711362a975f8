"""The straight-through estimator: the value of one tensor with the gradient of another."""

import torch
from torch import Tensor

from flowbp_kernels import backend
from flowbp_kernels.arguments import check_float, check_like


def straight_through(value: Tensor, surrogate: Tensor, scale: float = 1.0) -> Tensor:
    """The value of one tensor with the gradient, times `scale`, of another.

    value, surrogate: one shape, any float dtypes. Returns a copy of `value`, bit for bit, in value.dtype.
    Gradient: scale to surrogate; none to value. scale multiplies the backward only; scale = 0 cuts.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    There is nothing to fuse in a copy: PyTorch's own runs on every device, whatever FLOWBP_KERNELS says.
    Equivalent to  value.detach() + scale * (surrogate - surrogate.detach()), without its rounding.
    """
    check_float("value", value)
    check_like("surrogate", surrogate, value, "value")
    return _op(value, surrogate, scale) if backend.needs_operator(value, surrogate) else value.clone()


@torch.library.custom_op("flowbp_kernels::straight_through", mutates_args=())
def _op(value: Tensor, surrogate: Tensor, scale: float) -> Tensor:
    return value.clone()


@_op.register_fake
def _(value, surrogate, scale):
    return torch.empty_like(value)


def _setup_context(ctx, inputs, output):
    _, surrogate, ctx.scale = inputs
    ctx.dtype = surrogate.dtype


def _backward(ctx, g):
    scaled = torch.zeros_like(g) if ctx.scale == 0 else ctx.scale * g
    return None, scaled.to(ctx.dtype), None


_op.register_autograd(_backward, setup_context=_setup_context)
