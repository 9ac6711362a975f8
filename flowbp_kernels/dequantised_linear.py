"""A linear layer of a frozen weight that is held in fewer bits.

Autograd keeps the factors of a product for backward: of x W^T with W = dequantize(weight) it would keep W, and so the
graph of a pass would hold the whole plain network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dequantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, where W = weight.dequantize(), which is made anew by backward.

    x: [*, in].  weight: [out, in], a tensor subclass with `dequantize`, such as those of torchao.  bias: [out] or None.
    Returns [*, out]. Gradient: g W to x; none to weight and bias, which are frozen. It has no gradient of its own.
    Equivalent to  F.linear(x, weight.dequantize(), bias)  with weight and bias detached.
    """
    return _DequantisedLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class DequantisedLinear(nn.Linear):
    """A linear layer whose weight was quantised in place."""

    def forward(self, input: Tensor) -> Tensor:
        return dequantised_linear(input, self.weight, self.bias)


class _DequantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return g @ weight.dequantize().to(g.dtype), None, None
