"""cfg_euler_step in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS, grid

BLOCK = 1024  # with 4 warps: one 16-byte load of bfloat16 a thread, two of float32


@triton.jit
def kernel(x, v_cond, v_uncond, guidance, h, on_device, velocity, out, size, BLOCK: tl.constexpr):
    """velocity[i] = v_u[i] + guidance (v_c[i] - v_u[i]);  out[i] = x[i] + h velocity[i], with velocity as stored."""
    guidance, h = tl.cast(guidance, tl.float32), tl.cast(h, tl.float32)
    if on_device is not None:
        guidance, h = tl.load(on_device).to(tl.float32), tl.load(on_device + 1).to(tl.float32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    v = tl.load(v_cond + i, inside)
    if v_uncond is not None:
        v_u = tl.load(v_uncond + i, inside).to(tl.float32)
        v = tl.fma(v.to(tl.float32) - v_u, guidance, v_u)
    if velocity is not None:
        v = v.to(velocity.dtype.element_ty)
        tl.store(velocity + i, v, inside)
    end = tl.fma(v.to(tl.float32), h, tl.load(x + i, inside).to(tl.float32))
    tl.store(out + i, end.to(out.dtype.element_ty), inside)


def cfg_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    h: float,
    on_device: Tensor | None = None,
    velocity_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond) and x + h v, in one pass, both in float32. x + h v uses v as rounded
    to its dtype.

    x, v_cond, v_uncond: [B, *S] float32, bfloat16 or float16, contiguous, on one device. v_uncond None: v is v_cond,
    without a copy.
    guidance, h: numbers, which travel by value.  on_device: [2] float64, both of them, to be read in their place; None
    takes the numbers.
    Returns (x + h v, v): `out` and `velocity_out`, or new tensors in the dtypes of x and v_cond. `out` may be x,
    `velocity_out` may be v_cond.
    """
    out = torch.empty_like(x) if out is None else out
    velocity = velocity_out
    if velocity is None and v_uncond is not None:
        velocity = torch.empty_like(v_cond)
    assert all(t.is_contiguous() for t in (x, v_cond, v_uncond, velocity, out) if t is not None)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            kernel[grid(1, x.numel(), BLOCK)](
                x, v_cond, v_uncond, float(guidance), float(h), on_device, velocity, out, x.numel(), BLOCK, **OPTIONS
            )
    return out, v_cond if velocity is None else velocity
