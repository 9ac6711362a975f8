"""float32 matrix products in TF32, for one function and for its gradient.

TF32 has float32's range and 10 bits of mantissa in place of 23, and tensor cores multiply it. PyTorch's switch is the
whole process's, and what counts is how it stands when a product runs: those of a backward pass run when the gradient is
taken, and not when the function was called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def tf32_matmuls() -> Iterator[None]:
    """float32 matrix products on CUDA may round their factors to TF32 in the block. Its end puts the switch back, also
    after an error. Convolutions have a switch of their own. The switch is the process's: one thread at a time may be in
    the block.

    In the block torch.backends.cuda.matmul.allow_tf32, the older name of the switch, cannot be read: torch raises
    RuntimeError where the two differ.
    """
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        switch.fp32_precision = before


def in_tf32(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with `tf32_matmuls` around its forward pass and around its backward pass, and around no other.

    function: differentiable in x, once; a gradient to anything else is lost, so its weights must be frozen.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _InTF32.apply(function, x)  # pyright: ignore[reportReturnType]
    with tf32_matmuls():
        return function(x)


class _InTF32(torch.autograd.Function):
    """Keeps the graph of function(x), and differentiates it within its own backward."""

    @staticmethod
    def forward(ctx, function, x):
        with torch.enable_grad(), tf32_matmuls():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
        if not y.requires_grad:
            raise ValueError("the function does not depend on x: there is nothing to differentiate")
        ctx.graph = leaf, y
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        leaf, y = ctx.graph
        with tf32_matmuls():
            return None, *torch.autograd.grad(y, leaf, g)
