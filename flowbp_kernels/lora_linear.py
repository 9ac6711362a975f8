"""The LoRA linear layer (Hu et al. 2021, arXiv 2106.09685): a linear layer and its low-rank branch, in one buffer.

The branch that peft builds beside a bfloat16 layer copies the input to float32, keeps the copy for backward, and adds
two tensors of the output's size. Here the branch is two thin GEMMs, of which the second accumulates into the output of
the layer, and backward keeps the input that autograd keeps anyway.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_kernels import backend
from flowbp_kernels.arguments import accumulation_dtype, check_float
from flowbp_kernels.operators import Recorded


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
    Returns [*, out]. a, scale b and x a^T are rounded to the layer's dtype, as peft has them under autocast; the
    branch accumulates in float32 onto the output of the layer.
    Gradient: to x, weight, bias, a and b, where they ask for one. Those of a and b accumulate in float32 (float64 for a
    float64 layer) and are rounded once, to the parameter's dtype. Backward keeps the parameters, x where the
    gradient of a matrix needs it, and computes x a^T again. It has no gradient of its own.
    Under autocast x, weight and bias are cast as torch.nn.functional.linear casts them.
    The GEMMs are PyTorch's own on every device, whatever FLOWBP_KERNELS says.
    Raises ValueError for shapes, dtypes and devices outside this contract.
    Equivalent to  F.linear(x, weight, bias) + scale * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    """
    check_float("x", x)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if isinstance(weight, Tensor):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    matrix, base = (weight, None) if isinstance(weight, Tensor) else (None, weight(x))
    if base is not None:
        check_float("weight(x)", base)
        x = x.to(base.dtype)
    _check(x, matrix, bias, base, a, b)
    return _op(x, matrix, bias, base, a, b, float(scale))


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


def _rows(x: Tensor | None) -> Tensor:
    assert x is not None
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
    g: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor, b: Tensor, scale: float, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those of x, weight, bias, a and b that `needs` names, in this order. x is None where only x and
    bias are among them.
    """
    needs_x, needs_weight, needs_bias, needs_a, needs_b = needs
    shape, g, (thin_a, thin_b) = g.shape[:-1], _rows(g), _thin(a, b, scale, g.dtype)
    gradients = []
    # Autograd may call this within an autocast region, where a GEMM of float32 would be cast.
    with torch.autocast(g.device.type, enabled=False):
        g_h = g @ thin_b if needs_x or needs_a else g
        if needs_x:
            g_x = g_h @ thin_a if weight is None else (g @ weight).addmm_(g_h, thin_a)
            gradients.append(g_x.view(*shape, a.shape[1]))
        if needs_weight:
            gradients.append(g.t() @ _rows(x))
        if needs_bias:
            gradients.append(g.sum(0))
        if needs_a:
            gradients.append(_accumulated(g_h, _rows(x)).to(a.dtype))
        if needs_b:
            gradients.append((_accumulated(g, _rows(x) @ thin_a.t()) * scale).to(b.dtype))
    return gradients


def _accumulated(left: Tensor, right: Tensor) -> Tensor:
    """left^T right in float32 (float64 for float64), although its factors are narrower."""
    dtype = accumulation_dtype(left)
    if left.dtype != dtype and left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return left.t().to(dtype) @ right.to(dtype)  # PyTorch's CPU has no such GEMM


def _keep(ctx, inputs, output):
    x, weight, bias, base, a, b, ctx.scale = inputs
    ctx.needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    _, needs_weight, _, needs_a, needs_b = ctx.needs
    ctx.save_for_backward(x if needs_weight or needs_a or needs_b else None, weight, a, b)


def _backward(ctx, g):
    x, weight, a, b = ctx.saved_tensors  # once: checkpointing gives them once
    run = _backward_op if backend.needs_operator(g, x, weight, a, b) else _run_backward
    gradients = iter(run(g, x, weight, a, b, ctx.scale, ctx.needs))
    of_x, of_weight, of_bias, of_a, of_b = (next(gradients) if needed else None for needed in ctx.needs)
    return of_x, of_weight, of_bias, g if ctx.needs_input_grad[3] else None, of_a, of_b, None


def _fake(x, weight, bias, base, a, b, scale):
    return x.new_empty(*x.shape[:-1], b.shape[0])


def _backward_fake(g, x, weight, a, b, scale, needs):
    of_x, of_bias = g.new_empty(*g.shape[:-1], a.shape[1]), g.new_empty(b.shape[0])
    wanted = zip((of_x, weight, of_bias, a, b), needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, needed in wanted if needed]


_op = Recorded("lora_linear", _run, _run, _fake, _keep, _backward)
_backward_op = torch.library.custom_op("flowbp_kernels::lora_linear_backward", _run_backward, mutates_args=())
_backward_op.register_fake(_backward_fake)
