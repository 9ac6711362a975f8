"""One Euler step of classifier-free guidance, and both cache writes, in one pass."""

from torch import Tensor

from flowbp_kernels.cfg_multistep_step import step


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
    It is the cfg_multistep_step of no earlier velocities.
    Equivalent to  v = (v_u.float() + guidance * (v_c.float() - v_u.float())).to(v_c.dtype);  x_next = x + h * v
    """
    return step(x, v_cond, v_uncond, guidance, h, None, None, None, velocity_out, out)
