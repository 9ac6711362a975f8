"""The activations of a transformer's feed-forward layers. A single-stream block joins its attention's output and its
activation for one output projection: `prefix` writes both into one tensor, in the same pass.
"""

import math

import torch
from torch import Tensor, library

from flowbp_kernels import backend
from flowbp_kernels import network_reference as reference
from flowbp_kernels.arguments import check_float, check_like
from flowbp_kernels.operators import Recorded

_compiled = torch.ops.flowbp_compiled


def swiglu(gate: Tensor, value: Tensor, *, prefix: Tensor | None = None) -> Tensor:
    """silu(gate) * value with silu(x) = x sigmoid(x), in float32 (float64 if gate is float64), rounded once.

    gate, value: [..., M], one float dtype. Halves of one projection are read where they lie; take them with
    `projection.chunk(2, -1)`, whose gradient is one pass, and not as two slices.
    prefix: [..., P] of gate's dtype: what the result stands behind; None for nothing.
    Returns [..., M], or [prefix, silu(gate) * value] of [..., P + M], contiguous, in gate's dtype.
    Gradient, with s = sigmoid(gate): g value s (1 + gate (1 - s)) to gate, g gate s to value; that of prefix is a view
    of its part of g. The backward keeps gate and value.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  torch.cat([prefix, (F.silu(gate.float()) * value.float()).to(gate.dtype)], -1)
    """
    check_float("gate", gate)
    check_like("value", value, gate, "gate")
    if value.dtype != gate.dtype:
        raise ValueError(f"gate is {gate.dtype} and value {value.dtype}; they must share one dtype: cast one")
    _check_prefix(prefix, gate, "gate")
    return _swiglu_op(gate, value, prefix)


def gelu(x: Tensor, *, prefix: Tensor | None = None) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, the tanh approximation of GELU, in float32 (float64 if x is
    float64), rounded once.

    x: [..., M], any float dtype.
    prefix: [..., P] of x's dtype: what the result stands behind; None for nothing.
    Returns [..., M], or [prefix, gelu(x)] of [..., P + M], contiguous, in x's dtype.
    Gradient: to x, which the backward keeps; that of prefix is a view of its part of g.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  torch.cat([prefix, F.gelu(x, approximate="tanh")], -1)
    """
    check_float("x", x)
    _check_prefix(prefix, x, "x")
    return _gelu_op(x, prefix)


def _check_prefix(prefix: Tensor | None, x: Tensor, name: str) -> None:
    if x.dim() < 1:
        raise ValueError(f"{name} must be [..., M]; it has no dimension")
    if prefix is None:
        return
    check_float("prefix", prefix)
    if prefix.dim() != x.dim() or prefix.shape[:-1] != x.shape[:-1] or prefix.dtype != x.dtype:
        raise ValueError(
            f"prefix must be [..., P] like {name} but for the last dimension, {tuple(x.shape)} {x.dtype}; got "
            f"{tuple(prefix.shape)} {prefix.dtype}"
        )
    if prefix.device != x.device:
        raise ValueError(f"prefix is on {prefix.device} and {name} on {x.device}; move them together")


def _swiglu(gate: Tensor, value: Tensor, prefix: Tensor | None) -> Tensor:
    runs = backend.select("activations", in_rows=True, gate=gate)
    if runs == "reference":
        return reference.swiglu(gate, value, prefix)
    out = _like_joint(gate, prefix)
    launch = backend.triton_op("activations", "swiglu") if runs == "triton" else _compiled.activations.default
    launch(*map(_rows, (gate, value, prefix, out)))
    return out


def _swiglu_backward(g: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    runs = backend.select("activations", in_rows=True, gate=gate)
    if runs == "reference":
        return reference.swiglu_backward(g, gate, value)
    of_gate, of_value = gate.new_empty(gate.shape), value.new_empty(value.shape)
    launch = (
        backend.triton_op("activations", "swiglu_backward")
        if runs == "triton"
        else _compiled.activations_backward.default
    )
    launch(*map(_rows, (g, gate, value, of_gate, of_value)))
    return of_gate, of_value


def _gelu(x: Tensor, prefix: Tensor | None) -> Tensor:
    runs = backend.select("activations", in_rows=True, x=x)
    if runs == "reference":
        return reference.gelu(x, prefix)
    out = _like_joint(x, prefix)
    launch = backend.triton_op("activations", "gelu") if runs == "triton" else _compiled.activations.default
    launch(*map(_rows, (x, None, prefix, out)))
    return out


def _gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    runs = backend.select("activations", in_rows=True, x=x)
    if runs == "reference":
        return reference.gelu_backward(g, x)
    of_x = x.new_empty(x.shape)
    launch = (
        backend.triton_op("activations", "gelu_backward")
        if runs == "triton"
        else _compiled.activations_backward.default
    )
    launch(*map(_rows, (g, x, None, of_x, None)))
    return of_x


def _rows(x: Tensor | None) -> Tensor | None:
    """x as rows [R, M] with M contiguous: where it lies if one stride serves all rows, else a copy."""
    if x is None:
        return None
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _like_joint(x, *others):
    prefix = others[-1]
    return x.new_empty(*x.shape[:-1], x.shape[-1] + (0 if prefix is None else prefix.shape[-1]))


def _keep(ctx, inputs, output):
    *activated, prefix = inputs
    ctx.save_for_backward(*activated)
    ctx.before = 0 if prefix is None else prefix.shape[-1]


def _swiglu_gradients(ctx, g):
    (before, after), saved = _parts(ctx, g), ctx.saved_tensors
    run = _swiglu_backward_op if backend.needs_operator(g, *saved) else _swiglu_backward
    return *run(after, *saved), before


def _gelu_gradients(ctx, g):
    (before, after), saved = _parts(ctx, g), ctx.saved_tensors
    run = _gelu_backward_op if backend.needs_operator(g, *saved) else _gelu_backward
    return run(after, *saved), before


def _parts(ctx, g: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradients of the prefix, if there is one, and of the activation: views of g."""
    return (g[..., : ctx.before] if ctx.needs_input_grad[-1] else None), g[..., ctx.before :]


def _new_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


_swiglu_op = Recorded("swiglu", _swiglu, _swiglu, _like_joint, _keep, _swiglu_gradients)
_swiglu_backward_op = library.custom_op("flowbp_kernels::swiglu_backward", _swiglu_backward, mutates_args=())
_swiglu_backward_op.register_fake(lambda g, gate, value: _new_like(gate, value))

_gelu_op = Recorded("gelu", _gelu, _gelu, _like_joint, _keep, _gelu_gradients)
_gelu_backward_op = library.custom_op("flowbp_kernels::gelu_backward", _gelu_backward, mutates_args=())
_gelu_backward_op.register_fake(lambda g, x: _new_like(x)[0])
