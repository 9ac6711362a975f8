"""The LoRA linear layer (Hu et al. 2021, arXiv 2106.09685): a linear layer and its low-rank branch, in one buffer.

The branch that peft builds beside a bfloat16 layer copies the input to float32, keeps the copy for backward, and adds
two tensors of the output's size. Here the branch is two thin GEMMs, of which the second accumulates into the output of
the layer, and backward keeps the input that autograd keeps anyway. The GEMMs are PyTorch's own on every device.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_kernels.arguments import accumulation_dtype, check_float, is_traced


def lora_linear(
    x: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """x W^T + bias + scale (x a^T) b^T in the dtype of the layer.

    x: [*, in].  weight: [out, in] of x's dtype; or the layer itself, a callable of x (a quantised layer), whose output
    [*, out] then gives the dtype of the branch, and bias is None.  bias: [out] of x's dtype, or None.
    a: [r, in], b: [out, r], float parameters of any dtype (float32 beside a bfloat16 network).  scale: a number.
    Returns [*, out]. The branch multiplies a, scale b and x a^T as rounded to the layer's dtype, accumulates in float32
    and is rounded once with the sum, as peft does under autocast.
    Gradient: to x, weight, bias, a and b, where they ask for one; those of a and b accumulate in float32 and are rounded
    once, to the parameter's dtype. Backward keeps x and the parameters, and computes x a^T again. No second derivative.
    Under autocast x, weight and bias are cast as torch.nn.functional.linear casts them.
    Raises ValueError for shapes, dtypes and devices outside this contract.
    Equivalent to  F.linear(x, weight, bias) + scale * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    """
    check_float("x", x)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        if isinstance(weight, Tensor):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    base = None if isinstance(weight, Tensor) else weight(x)
    if base is not None:
        x, weight = x.to(base.dtype), None
    _check(x, weight, bias, base, a, b)
    return (_op if is_traced() else _LoraLinear.apply)(x, weight, bias, base, a, b, float(scale))


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, a: Tensor, b: Tensor) -> None:
    for name, tensor in {"a": a, "b": b, "weight": weight, "bias": bias, "weight(x)": base}.items():
        if tensor is None:
            continue
        check_float(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them together")
        if tensor is not a and tensor is not b and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}; convert x, or run under torch.autocast")
    if x.dim() < 1 or a.dim() != 2 or b.dim() != 2 or a.shape != (b.shape[1], x.shape[-1]):
        raise ValueError(
            f"a must be [r, in] and b [out, r] for x of shape [*, in]; got a {list(a.shape)}, b {list(b.shape)} and x "
            f"{list(x.shape)}"
        )
    shapes = {
        "weight": (weight, (b.shape[0], a.shape[1])),
        "bias": (bias, (b.shape[0],)),
        "weight(x)": (base, (*x.shape[:-1], b.shape[0])),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, by a and b; got {list(tensor.shape)}")
    if base is not None and bias is not None:
        raise ValueError("bias must be None where weight is a callable: the layer adds its own")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _thin(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a and scale b in the layer's dtype."""
    return a.to(dtype), (b * scale).to(dtype)


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    rows, (a, b) = _rows(x), _thin(a, b, scale, x.dtype)
    if base is not None:  # belongs to its own layer, so that the sum needs a new tensor
        return torch.addmm(_rows(base), rows @ a.t(), b.t()).view(base.shape)
    assert weight is not None
    y = F.linear(rows, weight, bias).addmm_(rows @ a.t(), b.t())
    return y.view(*x.shape[:-1], len(b))


def _run_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, scale: float, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those of x, weight, bias, a and b that `needs` names, in this order."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b = needs
    rows, g, (thin_a, thin_b) = _rows(x), _rows(g), _thin(a, b, scale, x.dtype)
    # Autograd may call this within an autocast region, where a GEMM of float32 would be cast.
    with torch.autocast(x.device.type, enabled=False):
        g_h = g @ thin_b if needs_x or needs_a else g
        gradients = []
        if needs_x:
            g_x = g_h @ thin_a if weight is None else (g @ weight).addmm_(g_h, thin_a)
            gradients.append(g_x.view(x.shape))
        if needs_weight:
            gradients.append(g.t() @ rows)
        if needs_bias:
            gradients.append(g.sum(0))
        if needs_a:
            gradients.append(_accumulated(g_h, rows).to(a.dtype))
        if needs_b:
            gradients.append((_accumulated(g, rows @ thin_a.t()) * scale).to(b.dtype))
    return gradients


def _accumulated(left: Tensor, right: Tensor) -> Tensor:
    """left^T right in float32 (float64 for float64), although its factors are narrower."""
    dtype = accumulation_dtype(left)
    if left.dtype != dtype and left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return left.t().to(dtype) @ right.to(dtype)  # PyTorch's CPU has no such GEMM


def _setup_context(ctx, inputs, output):
    x, weight, bias, base, a, b, ctx.scale = inputs
    ctx.needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    ctx.save_for_backward(x, weight, a, b)


def _backward(ctx, g):
    run = _op_backward if is_traced() else _run_backward
    gradients = iter(run(g, *ctx.saved_tensors, ctx.scale, ctx.needs))
    x, weight, bias, a, b = (next(gradients) if needed else None for needed in ctx.needs)
    return x, weight, bias, g if ctx.needs_input_grad[3] else None, a, b, None


class _LoraLinear(torch.autograd.Function):
    """Where nothing traces: a third of the overhead of the registered operator."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))


_op = torch.library.custom_op("flowbp_kernels::lora_linear", _run, mutates_args=())
_op_backward = torch.library.custom_op("flowbp_kernels::lora_linear_backward", _run_backward, mutates_args=())


@_op.register_fake
def _(x, weight, bias, base, a, b, scale):
    return x.new_empty(*x.shape[:-1], b.shape[0])


@_op_backward.register_fake
def _(g, x, weight, a, b, scale, needs):
    of = [x.new_empty(x.shape), weight, x.new_empty(b.shape[0]), a, b]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, needed in zip(of, needs, strict=True)
        if needed
    ]


_op.register_autograd(_backward, setup_context=_setup_context)
