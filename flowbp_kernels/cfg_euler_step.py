"""One Euler step of classifier-free guidance, and both cache writes, in one pass."""

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import COMPILED_DTYPES, check_float, check_like, check_out
from flowbp_kernels.bridge_cotangents import bridge_cotangents
from flowbp_kernels.quadrature_update import quadrature_update


def cfg_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    h: float,
    *,
    velocity_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond),  x_next = x + h v, in float32 (float64 if a tensor is float64).

    x, v_cond, v_uncond: [B, *S], any float dtype; v_cond and v_uncond share one. v_uncond None: no guidance, v = v_cond.
    guidance: a number.  h: sigma_next - sigma (negative), a number or a 0-dimensional CPU tensor.
    velocity_out: [B, *S] contiguous, any dtype of v_cond, x, float32, bfloat16, float16: a slot of the velocity
    cache.  out: [B, *S] contiguous, x.dtype: a slot of the latent cache. Written and returned, without gradient.
    Returns (x_next in x.dtype, v in velocity_out's dtype, else v_cond's). x_next uses v as rounded to that dtype, so that
    a replay which reads v from the cache meets the same x_next. Without guidance and velocity_out, v is v_cond itself.
    Gradient: 1 to x, guidance and 1 - guidance (times h, for x_next) to v_cond and v_uncond; none to guidance and h.
    Strided inputs are made contiguous. Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  v = (v_u.float() + guidance * (v_c.float() - v_u.float())).to(v_c.dtype);  x_next = x + h * v
    """
    check_float("x", x)
    check_like("v_cond", v_cond, x, "x")
    if v_uncond is not None:
        check_like("v_uncond", v_uncond, x, "x")
        if v_cond.dtype != v_uncond.dtype:
            raise ValueError(f"v_cond is {v_cond.dtype} and v_uncond {v_uncond.dtype}; they must share one dtype: cast one")
    if isinstance(h, Tensor):
        if h.dim() != 0 or h.device.type != "cpu":
            raise ValueError(f"h must be a number or a 0-dimensional CPU tensor, not of shape {tuple(h.shape)} on {h.device}")
        h = h.item()
    inputs = (x, v_cond, v_uncond)
    check_out("out", out, x.shape, (x.dtype,), inputs)
    check_out("velocity_out", velocity_out, x.shape, (v_cond.dtype, x.dtype, *COMPILED_DTYPES), inputs)

    if v_uncond is None and velocity_out is None:  # a quadrature of one node
        return quadrature_update(x, v_cond.contiguous()[None], [0], [h], out=out), v_cond
    x, v_cond, v_uncond = (None if t is None else t.contiguous() for t in inputs)
    arguments = x, v_cond, v_uncond, guidance, h
    if not backend.needs_operator(x, v_cond, v_uncond, velocity_out, out):
        return _run(*arguments, velocity_out, out)
    if out is None and velocity_out is None:
        return _op(*arguments)
    out = torch.empty_like(x) if out is None else out
    velocity_out = torch.empty_like(v_cond) if velocity_out is None else velocity_out
    _op_out(*arguments, velocity_out, out)
    return out, velocity_out


def _run(x, v_cond, v_uncond, guidance, h, velocity_out=None, out=None) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x) if out is None else backend.written(out)
    velocity_out = torch.empty_like(v_cond) if velocity_out is None else backend.written(velocity_out)
    runs = backend.select("cfg_euler_step", x=x, v_cond=v_cond, v_uncond=v_uncond, velocity_out=velocity_out)
    if runs == "reference":
        x_next, velocity = reference.cfg_euler_step(x, v_cond, v_uncond, guidance, h, velocity_out.dtype)
        out.copy_(x_next), velocity_out.copy_(velocity)
    elif runs == "triton":
        backend.triton_op("cfg_euler_step")(x, v_cond, v_uncond, guidance, h, velocity_out=velocity_out, out=out)
    else:
        torch.ops.flowbp_compiled.cfg_euler_step(x, v_cond, v_uncond, guidance, h, velocity_out, out)
    return out, velocity_out


@torch.library.custom_op("flowbp_kernels::cfg_euler_step_out", mutates_args=("velocity_out", "out"))
def _op_out(x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance: float, h: float, velocity_out: Tensor, out: Tensor) -> None:
    _run(x, v_cond, v_uncond, guidance, h, velocity_out, out)


@torch.library.custom_op("flowbp_kernels::cfg_euler_step", mutates_args=())
def _op(x: Tensor, v_cond: Tensor, v_uncond: Tensor, guidance: float, h: float) -> tuple[Tensor, Tensor]:
    return _run(x, v_cond, v_uncond, guidance, h)


@_op.register_fake
def _(x, v_cond, v_uncond, guidance, h):
    return torch.empty_like(x), torch.empty_like(v_cond)


def _setup_context(ctx, inputs, output):
    _, v_cond, _, ctx.guidance, ctx.h = inputs
    ctx.dtype = v_cond.dtype


def _backward(ctx, of_x_next, of_velocity):
    """v's cotangent is of_velocity + h of_x_next, shared out between the branches."""
    shares = [ctx.guidance, 1 - ctx.guidance]
    of_cond, of_uncond = bridge_cotangents(of_velocity, of_x_next, shares, [ctx.h, ctx.h], dtype=ctx.dtype).unbind()
    return of_x_next, of_cond, of_uncond, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
