"""A linear layer of a frozen weight that is held in fewer bits.

Autograd keeps the factors of a product for backward: of x W^T with W = dequantize(weight) it would keep W, and so the
graph of a pass would hold the whole plain network.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dequantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, where W = weight.dequantize(), which is made anew by backward.

    x: [*, in].  weight: [out, in], a tensor subclass with `dequantize`, such as those of torchao.  bias: [out] or None.
    Returns [*, out]. Gradient: g W to x; none to weight and bias, which are frozen. It has no gradient of its own.
    Equivalent to  F.linear(x, weight.dequantize(), bias)  with weight and bias detached.
    """
    return _DequantisedLinear.apply(x, weight, bias, type(weight).dequantize)  # pyright: ignore[reportReturnType]


class DequantisedLinear(nn.Linear):
    """A linear layer whose weight was quantised in place."""

    def forward(self, input: Tensor) -> Tensor:
        return dequantised_linear(input, self.weight, self.bias)


class PackedLinear(nn.Linear):
    """A quantised `layer` on the meta device, to count bytes: it holds as many as bitsandbytes or torchao would, and
    makes what they make for its product and for backward. Neither need be there.

    method: "nf4" takes half a byte an entry, a byte for 64 entries, a float32 for 256 of those bytes, and a table of 17
        float32; it dequantises to the layer's dtype. "int8" and "float8" take a byte an entry and a float32 a row, and
        dequantise in float32.
    """

    def __init__(self, layer: nn.Linear, method: str):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        entries, scales = layer.weight.numel(), -(-layer.weight.numel() // 64)
        nf4 = -(-entries // 2) + scales + 4 * -(-scales // 256) + 68
        size = nf4 if method == "nf4" else entries + 4 * layer.out_features
        packed = torch.empty(size, dtype=torch.int8, device="meta")
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias
        self.method, self.dtype = method, layer.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        return _DequantisedLinear.apply(input, self.weight, self.bias, self.dequantised)  # pyright: ignore[reportReturnType]

    def dequantised(self, weight: Tensor) -> Tensor:
        # torchao takes int8 in the layer's dtype and float8 in float32 times the scales, whose product is float32.
        shape, narrow = (self.out_features, self.in_features), self.method != "float8"
        entries = partial(weight.new_empty, shape, dtype=self.dtype if narrow else torch.float32)
        if self.method == "nf4":
            return entries()
        return (entries() * weight.new_empty((self.out_features, 1), dtype=torch.float32)).to(self.dtype)


class _DequantisedLinear(torch.autograd.Function):
    """dequantise: the dense weight of a packed one."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dequantise: Callable[[Tensor], Tensor]):
        ctx.save_for_backward(weight)
        ctx.dequantise = dequantise
        return F.linear(x, dequantise(weight), bias)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return g @ ctx.dequantise(weight).to(g.dtype), None, None, None
