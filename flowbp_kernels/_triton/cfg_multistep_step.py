"""cfg_multistep_step in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowbp_kernels._triton import OPTIONS, block_of, grid, loadable, runs
from flowbp_kernels._triton.rows import add_rows, place


@triton.jit(do_not_specialize=["node_columns", "weight_columns", "num_nodes", "num_cached", "count"])
def kernel(
    x, v_cond, v_uncond, guidance, h, on_device, velocities, velocity, out, nodes, node_columns, weights,
    weight_columns, num_nodes, num_cached, count, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """velocity[b, i] = v_u[b, i] + guidance (v_c[b, i] - v_u[b, i])
    out[b, i] = x[b, i] + sum_k weights[k, b] velocities[nodes[k, b], b, i] + h velocity[b, i], with velocity as stored.
    """
    guidance, h = tl.cast(guidance, tl.float32), tl.cast(h, tl.float32)
    if on_device is not None:
        guidance, h = tl.load(on_device).to(tl.float32), tl.load(on_device + 1).to(tl.float32)
    b, i, inside = place(tl.program_id(0), size, BLOCK)
    here = b * size + i
    v = tl.load(v_cond + here, inside)
    if v_uncond is not None:
        v_u = tl.load(v_uncond + here, inside).to(tl.float32)
        v = tl.fma(v.to(tl.float32) - v_u, guidance, v_u)
    end = tl.load(x + here, inside).to(tl.float32)
    if velocities is not None:
        end = add_rows(
            end, velocities, None, nodes, node_columns, weights, weight_columns, num_nodes, num_cached, count, size,
            b, i, inside
        )  # fmt: skip
    if velocity is not None:
        v = v.to(velocity.dtype.element_ty)
        tl.store(velocity + here, v, inside)
    end = tl.fma(v.to(tl.float32), h, end)
    tl.store(out + here, end.to(out.dtype.element_ty), inside)


def cfg_multistep_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    h: float,
    on_device: Tensor | None = None,
    velocities: Tensor | None = None,
    nodes: Tensor | None = None,
    weights: Tensor | None = None,
    velocity_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond) and x + sum_k weights[k] velocities[nodes[k]] + h v, in one pass,
    both in float32, one FMA a term in this order. The last term uses v as rounded to its dtype.

    x, v_cond, v_uncond: [B, *S] float32, bfloat16 or float16, contiguous, on one device. v_uncond None: v is v_cond,
    without a copy.
    guidance, h: numbers, which travel by value.  on_device: [2] float64, both of them, to be read in their place; None
    takes the numbers.
    velocities: [N, B, *S], one of those dtypes or float8_e4m3fn; None: there are no rows, as in an Euler step.
    nodes: [K, 1] or [K, B] int64.  weights: [K, 1] or [K, B] float64.
    Returns (x_next, v): `out` and `velocity_out`, or new tensors in the dtypes of x and v_cond. `out` may be x,
    `velocity_out` may be v_cond.
    """
    out = torch.empty_like(x) if out is None else out
    velocity = velocity_out
    if velocity is None and v_uncond is not None:
        velocity = torch.empty_like(v_cond)
    tensors = x, v_cond, v_uncond, velocities, nodes, weights, velocity, out
    assert all(t.is_contiguous() for t in tensors if t is not None)
    if x.numel() > 0:
        cache, rule, (count, size), block = None, (None, 0, None, 0, 0, 0), (1, x.numel()), 1024
        if velocities is not None and nodes is not None and weights is not None:
            cache, block, (count, size) = loadable(velocities), block_of(velocities), runs(x, nodes, weights)
            rule = nodes, nodes.shape[1], weights, weights.shape[1], len(nodes), len(velocities)
        with torch.cuda.device_of(x):
            kernel[grid(count, size, block)](
                x, v_cond, v_uncond, float(guidance), float(h), on_device, cache, velocity, out, *rule, count, size,
                block, **OPTIONS
            )  # fmt: skip
    return out, v_cond if velocity is None else velocity
