"""One step of a rollout with classifier-free guidance, and both cache writes, in one pass: Euler's, and that of
Adams-Bashforth, which also weighs the velocities of earlier steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import (
    COMPILED_DTYPES,
    check_cache,
    check_float,
    check_like,
    check_nodes,
    check_number,
    check_out,
    check_rows,
    node_table,
    scalar_table,
    weight_table,
)
from flowbp_kernels.operators import register
from flowbp_kernels.quadrature_update import quadrature_update


def cfg_multistep_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float | Tensor,
    h: float | Tensor,
    velocities: Tensor,
    nodes: Tensor | Sequence[int],
    weights: Tensor | Sequence[float],
    *,
    velocity_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v = v_uncond + guidance (v_cond - v_uncond),  x_next = x + sum_k weights[k] velocities[nodes[k]] + h v, in
    float32 (float64 if a tensor is float64).

    x, v_cond, v_uncond: [B, *S], any float dtype; v_cond and v_uncond share one. v_uncond None: no guidance, v is
    v_cond.
    guidance, h: numbers or 0-dimensional tensors. h is the weight of v in sigma units: sigma_next - sigma for Euler.
    velocities: [N, B, *S], any float dtype (float8_e4m3fn too), on x's device: a cache with the earlier velocities.
    nodes: [K] or [K, B] integers in [0, N), the earlier steps' rows, repeats allowed.
    weights: [K] or [K, B], sigma units. With [K, B] each sample has a rule of its own.
    Guidance, h, nodes and weights are one rule. Numbers and CPU tensors travel by value; tensors on x's device are read
    by the kernel whenever it runs, and numbers guidance and h join them there. Both forms give the same bits.
    velocity_out: [B, *S] contiguous, any dtype of v_cond, x, float32, bfloat16, float16: a slot of the velocity cache,
    which may be a row of `velocities` that is not read.
    out: [B, *S] contiguous, x.dtype: a slot of the latent cache. Both are written and returned, without gradient.
    In place: velocity_out may be v_cond itself, out may be x itself. They overlap no other argument in memory, nor each
    other, and velocity_out no row that is read. On the device the host cannot see which rows those are.
    Returns (x_next in x.dtype, v in velocity_out's dtype, else v_cond's). The sum is rounded once; its terms are added
    in the order of `nodes`, v last, as rounded to its dtype. So x_next has the bits of cfg_euler_step where there are
    no nodes, and else those of cfg_euler_step and quadrature_update of x over the same rows with v behind them.
    Without guidance and velocity_out, v is v_cond itself. A row of weight zero is not read: it may hold NaN. A node
    outside [0, N) raises; on the device its sample becomes NaN, unless its weight is zero.
    Gradient of x_next: 1 to x, weights[k] to velocities[nodes[k]] (not to float8), h to v; of v: guidance to v_cond and
    1 - guidance to v_uncond; none to the rule.
    A strided x, v_cond or v_uncond is made contiguous; a strided cache runs on the reference.
    Raises ValueError for shapes, dtypes, devices, nodes or memory outside this contract.
    Equivalent to  v = (v_u.float() + guidance * (v_c.float() - v_u.float())).to(v_c.dtype)
    x_next = (x.float() + torch.einsum("k,k...->...", weights, velocities[nodes].float()) + h * v).to(x.dtype)
    """
    check_float("x", x)
    check_cache(velocities, x, None)
    nodes, weights = node_table(nodes, x), weight_table("weights", weights, x)
    check_rows("nodes", nodes, weights, "weights")
    return step(x, v_cond, v_uncond, guidance, h, velocities, nodes, weights, velocity_out, out)


def step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: float | Tensor,
    h: float | Tensor,
    velocities: Tensor | None,
    nodes: Tensor | None,
    weights: Tensor | None,
    velocity_out: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The step over the rows of checked tables; of no rows, where velocities, nodes and weights are None."""
    check_float("x", x)
    check_like("v_cond", v_cond, x, "x")
    if v_uncond is not None:
        check_like("v_uncond", v_uncond, x, "x")
        if v_cond.dtype != v_uncond.dtype:
            raise ValueError(
                f"v_cond is {v_cond.dtype} and v_uncond {v_uncond.dtype}; they must share one dtype: cast one"
            )
    inputs = (x, v_cond, v_uncond, velocities)
    check_out("out", out, x.shape, (x.dtype,), inputs)
    check_out("velocity_out", velocity_out, x.shape, (v_cond.dtype, x.dtype, *COMPILED_DTYPES), inputs)

    by_operator = backend.needs_operator(*inputs, velocity_out, out)
    on_device = nodes is not None and not nodes.is_cpu
    if by_operator or on_device or isinstance(guidance, Tensor) or isinstance(h, Tensor):
        coefficients: Any = scalar_table(x, nodes, guidance=guidance, h=h)
    else:
        check_number("guidance", guidance)
        check_number("h", h)
        coefficients = guidance, h
    if v_uncond is None and velocities is None and velocity_out is None and out is None:  # a quadrature of one node
        node = [0] if isinstance(coefficients, tuple) else torch.zeros(1, dtype=torch.long, device=coefficients.device)
        return quadrature_update(x, v_cond.contiguous()[None], node, coefficients[1:]), v_cond
    contiguous = (None if t is None else t.contiguous() for t in inputs[:3])
    arguments: Any = *contiguous, coefficients, velocities, nodes, weights
    if not by_operator:
        x_next, velocity = _run(*arguments, velocity=velocity_out, out=out)
    elif out is None and velocity_out is None:
        x_next, velocity = _op.of(coefficients)(*arguments)
        velocity = None if v_uncond is None else velocity
    else:
        x_next = torch.empty_like(arguments[0]) if out is None else out
        velocity = torch.empty_like(arguments[1]) if velocity_out is None and v_uncond is not None else velocity_out
        _op_out.of(coefficients)(*arguments, velocity, x_next)
    return x_next, v_cond if velocity is None else velocity


def _run(
    x, v_cond, v_uncond, coefficients, velocities, nodes, weights, velocity=None, out=None
) -> tuple[Tensor, Tensor | None]:
    """(x_next, v) for coefficients (guidance, h). v is None, and not written, where it is v_cond."""
    if nodes is not None:
        check_nodes(nodes, velocities)
    if isinstance(coefficients, Tensor) and coefficients.is_cpu:
        coefficients = tuple(coefficients.tolist())
    on_device = coefficients if isinstance(coefficients, Tensor) else None
    inputs = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "guidance and h": on_device}
    inputs |= {"nodes": nodes, "weights": weights}
    if out is None:
        out = torch.empty_like(x)
    else:
        backend.written("out", out, inputs | {"velocities": velocities, "velocity_out": velocity}, in_place_of="x")
    if velocity is not None:
        backend.written("velocity_out", velocity, inputs | _rows_read(velocities, nodes, weights), in_place_of="v_cond")
    elif v_uncond is not None:
        velocity = torch.empty_like(v_cond)
    tensors = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "velocities": velocities, "velocity_out": velocity}
    runs = backend.select("cfg_multistep_step", 0 if nodes is None else nodes.shape[0], **tensors)
    if runs == "reference":
        dtype = v_cond.dtype if velocity is None else velocity.dtype
        guidance, h = coefficients
        x_next, v = reference.cfg_multistep_step(
            x, v_cond, v_uncond, guidance, h, velocities, nodes, weights, velocity_dtype=dtype
        )
        out.copy_(x_next)
        if velocity is not None:
            velocity.copy_(v)
        return out, velocity
    if runs == "triton" and nodes is not None:
        nodes, weights = backend.triton_tables(x, nodes, weights)
    compiled = torch.ops.flowbp_compiled
    run = backend.triton_op("cfg_multistep_step") if runs == "triton" else compiled.cfg_multistep_step
    numbers = coefficients if on_device is None else (0.0, 0.0)
    run(x, v_cond, v_uncond, *numbers, on_device, velocities, nodes, weights, velocity, out)
    return out, velocity


def _rows_read(velocities, nodes, weights) -> dict[str, Tensor]:
    """The rows of the cache that a rule by value reads, by name; of a rule on the device nobody knows them here."""
    if nodes is None or not nodes.is_cpu:
        return {}
    read = torch.where(weights != 0, nodes, -1).flatten().tolist()
    return {f"velocities[{node}]": velocities[node] for node in sorted(set(read) - {-1})}


def _into(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    velocities: Tensor | None,
    nodes: Tensor | None,
    weights: Tensor | None,
    velocity_out: Tensor | None,
    out: Tensor,
) -> None:
    _run(x, v_cond, v_uncond, coefficients, velocities, nodes, weights, velocity_out, out)


def _new(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    coefficients: Tensor,
    velocities: Tensor | None,
    nodes: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x_next, velocity = _run(x, v_cond, v_uncond, coefficients, velocities, nodes, weights)
    return x_next, v_cond.new_empty(0) if velocity is None else velocity  # an operator returns none of its inputs


def _fake(x, v_cond, v_uncond, *_):
    return torch.empty_like(x), v_cond.new_empty(0) if v_uncond is None else torch.empty_like(v_cond)


_op = register(_new, "cfg_multistep_step", fake=_fake)  # its gradient: adjoints.py
_op_out = register(_into, "cfg_multistep_step_out", mutates=("velocity_out", "out"))
