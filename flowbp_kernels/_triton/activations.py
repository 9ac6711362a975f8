"""swiglu and gelu in Triton. A program takes a block of one row: of the prefix, which it copies, or of what follows."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS

BLOCK = 1024  # elements of one program: one 16-byte load for each thread and tensor, two for float32
SLOPE: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))  # tanh(u / 2) = 2 sigmoid(u) - 1
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def swiglu_kernel(gate, value, prefix, out, gate_row, value_row, prefix_row, before, width, BLOCK: tl.constexpr):
    """out[r] = [prefix[r], gate[r] sigmoid(gate[r]) value[r]]"""
    row, i, end = place(prefix, out, prefix_row, before, width, BLOCK)
    inside = (i >= 0) & (i < width)
    g = tl.load(gate + row * gate_row + i, inside, 0).to(tl.float32)
    v = tl.load(value + row * value_row + i, inside, 0).to(tl.float32)
    tl.store(end + i, (g * tl.sigmoid(g) * v).to(out.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(g, gate, value, of_gate, of_value, g_row, gate_row, value_row, width, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): of_gate = g value s (1 + gate (1 - s)),  of_value = g gate s"""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    upstream = tl.load(g + row * g_row + i, inside, 0).to(tl.float32)
    x = tl.load(gate + row * gate_row + i, inside, 0).to(tl.float32)
    v = tl.load(value + row * value_row + i, inside, 0).to(tl.float32)
    s = tl.sigmoid(x)
    slope = s * tl.fma(x, tl.sigmoid(-x), 1.0)  # 1 - s loses the last bits of what it has where s is near 1
    tl.store(of_gate + row * width + i, (upstream * v * slope).to(of_gate.dtype.element_ty), inside)
    tl.store(of_value + row * width + i, (upstream * x * s).to(of_value.dtype.element_ty), inside)


@triton.jit
def gelu_kernel(x, prefix, out, x_row, prefix_row, before, width, BLOCK: tl.constexpr):
    """out[r] = [prefix[r], x[r] sigmoid(u)] with u = 2 sqrt(2 / pi) (x + 0.044715 x^3)"""
    row, i, end = place(prefix, out, prefix_row, before, width, BLOCK)
    inside = (i >= 0) & (i < width)
    y = tl.load(x + row * x_row + i, inside, 0).to(tl.float32)
    s = tl.sigmoid(y * SLOPE * tl.fma(y * CUBIC, y, 1.0))
    tl.store(end + i, (y * s).to(out.dtype.element_ty), inside)


@triton.jit
def gelu_backward_kernel(g, x, of_x, g_row, x_row, width, BLOCK: tl.constexpr):
    """of_x = g s (1 + x (1 - s) du/dx) with s = sigmoid(u),  du/dx = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2)"""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    upstream = tl.load(g + row * g_row + i, inside, 0).to(tl.float32)
    y = tl.load(x + row * x_row + i, inside, 0).to(tl.float32)
    u = y * SLOPE * tl.fma(y * CUBIC, y, 1.0)
    slope = tl.fma(y * (3 * CUBIC), y, 1.0) * SLOPE
    of_y = upstream * tl.sigmoid(u) * tl.fma(y * tl.sigmoid(-u), slope, 1.0)
    tl.store(of_x + row * width + i, of_y.to(of_x.dtype.element_ty), inside)


@triton.jit
def place(prefix, out, prefix_row, before, width, BLOCK: tl.constexpr):
    """(row, i, end): a program's row, its elements of the activation, and where in `out` the activation begins. A
    program of the prefix copies its block, and has no element of the activation: its i are negative.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = out + row * (before + width)
    if prefix is not None:
        blocks = tl.cdiv(before, BLOCK)
        if block < blocks:
            p = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(start + p, tl.load(prefix + row * prefix_row + p, p < before), p < before)
        block -= blocks
    return row, block * BLOCK + tl.arange(0, BLOCK), start + before


def swiglu(gate: Tensor, value: Tensor, prefix: Tensor | None, out: Tensor) -> None:
    """out = [prefix, silu(gate) * value]   [R, P + M], in float32, rounded once.

    gate, value: [R, M] float32, bfloat16 or float16, one dtype.  prefix: [R, P] of that dtype, or None. Rows are
    contiguous, and `out` is.
    """
    if out.numel() > 0:
        before, width = 0 if prefix is None else prefix.shape[1], gate.shape[1]
        strides = gate.stride(0), value.stride(0), 0 if prefix is None else prefix.stride(0)
        with torch.cuda.device_of(gate):
            swiglu_kernel[grid(gate, before, width)](
                gate, value, prefix, out, *strides, before, width, BLOCK, **OPTIONS
            )  # fmt: skip


def swiglu_backward(g: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """The gradients of gate and value from g [R, M], the gradient of what stands behind the prefix."""
    if g.numel() > 0:
        width = gate.shape[1]
        with torch.cuda.device_of(g):
            swiglu_backward_kernel[grid(g, 0, width)](
                g, gate, value, of_gate, of_value, g.stride(0), gate.stride(0), value.stride(0), width, BLOCK, **OPTIONS
            )  # fmt: skip


def gelu(x: Tensor, value: None, prefix: Tensor | None, out: Tensor) -> None:
    """out = [prefix, gelu(x)], the tanh approximation   [R, P + M]. The arguments are those of swiglu but for value."""
    if out.numel() > 0:
        before, width = 0 if prefix is None else prefix.shape[1], x.shape[1]
        strides = x.stride(0), 0 if prefix is None else prefix.stride(0)
        with torch.cuda.device_of(x):
            gelu_kernel[grid(x, before, width)](x, prefix, out, *strides, before, width, BLOCK, **OPTIONS)


def gelu_backward(g: Tensor, x: Tensor, value: None, of_x: Tensor, of_value: None) -> None:
    """The gradient of x from g [R, M]; the arguments are those of swiglu_backward, without value."""
    if g.numel() > 0:
        width = x.shape[1]
        with torch.cuda.device_of(g):
            gelu_backward_kernel[grid(g, 0, width)](g, x, of_x, g.stride(0), x.stride(0), width, BLOCK, **OPTIONS)


def grid(rows: Tensor, before: int, width: int) -> tuple[int, int]:
    return len(rows), triton.cdiv(before, BLOCK) + triton.cdiv(width, BLOCK)
