"""One Euler step of classifier-free guidance, and both cache writes, in one pass."""

from typing import Any

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import COMPILED_DTYPES, check_float, check_like, check_number, check_out, scalar_table
from flowbp_kernels.bridge_cotangents import bridge_cotangents
from flowbp_kernels.operators import register
from flowbp_kernels.quadrature_update import quadrature_update


def cfg_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float | Tensor,
    h: float | Tensor,
    *,
    velocity_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond),  x_next = x + h v, in float32 (float64 if a tensor is float64).

    x, v_cond, v_uncond: [B, *S], any float dtype; v_cond and v_uncond share one. v_uncond None: no guidance, v is
    v_cond.
    guidance, h = sigma_next - sigma (negative): numbers or 0-dimensional tensors. Numbers and CPU tensors travel by
    value. A tensor on x's device is read by the kernel whenever it runs (a number beside it joins it there), so that
    one captured CUDA graph serves every step. Under torch.compile, 0-dimensional tensors share one graph and floats
    take at most two.
    velocity_out: [B, *S] contiguous, any dtype of v_cond, x, float32, bfloat16, float16: a slot of the velocity cache.
    out: [B, *S] contiguous, x.dtype: a slot of the latent cache. Both are written and returned, without gradient.
    In place: velocity_out may be v_cond itself, out may be x itself. They overlap no other argument in memory, nor each
    other.
    Returns (x_next in x.dtype, v in velocity_out's dtype, else v_cond's). x_next uses v as rounded to that dtype, so
    that a replay which reads v from the cache meets the same x_next. Without guidance and velocity_out, v is v_cond
    itself.
    Gradient: 1 to x, guidance and 1 - guidance (times h, for x_next) to v_cond and v_uncond; none to guidance and h.
    Strided inputs are made contiguous. Raises ValueError for shapes, dtypes, devices or memory outside this contract.
    Equivalent to  v = (v_u.float() + guidance * (v_c.float() - v_u.float())).to(v_c.dtype);  x_next = x + h * v
    """
    check_float("x", x)
    check_like("v_cond", v_cond, x, "x")
    if v_uncond is not None:
        check_like("v_uncond", v_uncond, x, "x")
        if v_cond.dtype != v_uncond.dtype:
            raise ValueError(
                f"v_cond is {v_cond.dtype} and v_uncond {v_uncond.dtype}; they must share one dtype: cast one"
            )
    inputs = (x, v_cond, v_uncond)
    check_out("out", out, x.shape, (x.dtype,), inputs)
    check_out("velocity_out", velocity_out, x.shape, (v_cond.dtype, x.dtype, *COMPILED_DTYPES), inputs)

    by_operator = backend.needs_operator(*inputs, velocity_out, out)
    if by_operator or isinstance(guidance, Tensor) or isinstance(h, Tensor):
        coefficients: Any = scalar_table(x, guidance=guidance, h=h)
    else:
        check_number("guidance", guidance)
        check_number("h", h)
        coefficients = guidance, h
    if v_uncond is None and velocity_out is None and out is None:  # a quadrature of one node
        node = [0] if isinstance(coefficients, tuple) else torch.zeros(1, dtype=torch.long, device=coefficients.device)
        return quadrature_update(x, v_cond.contiguous()[None], node, coefficients[1:]), v_cond
    arguments: Any = *(None if t is None else t.contiguous() for t in inputs), coefficients
    if not by_operator:
        x_next, velocity = _run(*arguments, velocity=velocity_out, out=out)
    elif out is None and velocity_out is None:
        x_next, velocity = _op.of(coefficients)(*arguments)
    else:
        x_next = torch.empty_like(arguments[0]) if out is None else out
        velocity = torch.empty_like(arguments[1]) if velocity_out is None and v_uncond is not None else velocity_out
        _op_out.of(coefficients)(*arguments, velocity, x_next)
    return x_next, v_cond if velocity is None else velocity


def _run(x, v_cond, v_uncond, coefficients, velocity=None, out=None) -> tuple[Tensor, Tensor | None]:
    """(x + h v, v) for coefficients (guidance, h). v is None, and not written, where it is v_cond."""
    if isinstance(coefficients, Tensor) and coefficients.is_cpu:
        coefficients = tuple(coefficients.tolist())
    on_device = coefficients if isinstance(coefficients, Tensor) else None
    inputs = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "guidance and h": on_device}
    if out is None:
        out = torch.empty_like(x)
    else:
        backend.written("out", out, inputs | {"velocity_out": velocity}, in_place_of="x")
    if velocity is not None:
        backend.written("velocity_out", velocity, inputs, in_place_of="v_cond")
    elif v_uncond is not None:
        velocity = torch.empty_like(v_cond)
    runs = backend.select("cfg_euler_step", x=x, v_cond=v_cond, v_uncond=v_uncond, velocity_out=velocity)
    if runs == "reference":
        dtype = v_cond.dtype if velocity is None else velocity.dtype
        x_next, v = reference.cfg_euler_step(x, v_cond, v_uncond, *coefficients, velocity_dtype=dtype)
        out.copy_(x_next)
        if velocity is not None:
            velocity.copy_(v)
    else:
        numbers = coefficients if on_device is None else (0.0, 0.0)
        run = backend.triton_op("cfg_euler_step") if runs == "triton" else torch.ops.flowbp_compiled.cfg_euler_step
        run(x, v_cond, v_uncond, *numbers, on_device, velocity, out)
    return out, velocity


def _into(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, coefficients: Tensor, velocity_out: Tensor | None, out: Tensor
) -> None:
    _run(x, v_cond, v_uncond, coefficients, velocity_out, out)


def _new(x: Tensor, v_cond: Tensor, v_uncond: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return _run(x, v_cond, v_uncond, coefficients)  # pyright: ignore[reportReturnType]


def _fake(x, v_cond, v_uncond, coefficients):
    return torch.empty_like(x), torch.empty_like(v_cond)


def _setup_context(ctx, inputs, output):
    _, v_cond, _, coefficients = inputs
    ctx.save_for_backward(coefficients)
    ctx.dtype = v_cond.dtype


def _backward(ctx, of_x_next, of_velocity):
    """The cotangent of v is of_velocity + h of_x_next. v_cond gets guidance times it, v_uncond 1 - guidance times."""
    guidance, h = ctx.saved_tensors[0]
    shares = torch.stack([guidance, 1 - guidance])
    of_cond, of_uncond = bridge_cotangents(of_velocity, of_x_next, shares, h.expand(2), dtype=ctx.dtype).unbind()
    return of_x_next, of_cond, of_uncond, None


_op = register(_new, "cfg_euler_step", fake=_fake)
_op.differentiate(_backward, _setup_context)
_op_out = register(_into, "cfg_euler_step_out", mutates=("velocity_out", "out"))
