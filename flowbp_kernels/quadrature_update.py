"""The quadrature update: one pass over a cache of velocities that carries a latent from one noise level to another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_kernels import backend, reference
from flowbp_kernels.arguments import (
    check_cache,
    check_float,
    check_nodes,
    check_out,
    check_rows,
    node_table,
    weight_table,
)
from flowbp_kernels.operators import register


def quadrature_update(
    x: Tensor,
    velocities: Tensor,
    nodes: Tensor | Sequence[int],
    weights: Tensor | Sequence[float],
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x + sum_k weights[k] scales[nodes[k]] velocities[nodes[k]], accumulated in float32 (float64 if a tensor is
    float64).

    x: [B, *S], any float dtype.  velocities: [N, B, *S], any float dtype (float8_e4m3fn too), on x's device.
    nodes: [K] or [K, B] integers in [0, N), repeats allowed.
    weights: [K] or [K, B], sigma units. With [K, B] each sample has a rule of its own.
    A rule of numbers or CPU tensors travels by value, as part of the launch. A rule of tensors on x's device (best
    int64 and float64: others are converted there) is read by the kernel whenever it runs, and never by the host, so
    that one captured CUDA graph serves every plan: fill up a plan of fewer nodes with weights of zero. Both forms give
    the same bits.
    scales: [N, B] float32 on x's device, what each cached sample was divided by when it was stored; None for ones.
    out: [B, *S] contiguous, x.dtype: written and returned, without gradient. It may be x itself; it overlaps no other
    argument in memory.
    Returns [B, *S] in x.dtype, rounded once. A velocity of weight zero is not read: it may hold NaN. A node outside
    [0, N) raises. On the device nothing can raise: the sample of such a node becomes NaN, unless its weight is zero.
    Gradient: 1 to x, weights[k] scales[nodes[k]] to velocities[nodes[k]] (not to float8); none to nodes, weights and
    scales.
    A strided x is made contiguous; a strided cache runs on the reference.
    Raises ValueError for shapes, dtypes, devices, nodes or memory outside this contract.
    Equivalent to  (x.float() + torch.einsum("k,k...->...", weights, velocities[nodes].float())).to(x.dtype)
    """
    check_float("x", x)
    check_cache(velocities, x, scales)
    nodes, weights = node_table(nodes, x), weight_table("weights", weights, x)
    check_rows("nodes", nodes, weights, "weights")
    check_out("out", out, x.shape, (x.dtype,), (x, velocities))
    arguments = x.contiguous(), velocities, nodes, weights, scales
    if not backend.needs_operator(x, velocities, out):
        return _run(*arguments, out)
    if out is None:
        return _op.of(nodes)(*arguments)
    _op_out.of(nodes)(*arguments, out)
    return out


def _run(x, velocities, nodes, weights, scales, out=None) -> Tensor:
    check_nodes(nodes, velocities)
    if out is None:
        out = torch.empty_like(x)
    else:
        others = {"x": x, "velocities": velocities, "scales": scales, "nodes": nodes, "weights": weights}
        backend.written("out", out, others, in_place_of="x")
    runs = backend.select("quadrature_update", nodes.shape[0], x=x, velocities=velocities)
    if runs == "reference":
        out.copy_(reference.quadrature_update(x, velocities, nodes, weights, scales))
    elif runs == "triton":
        nodes, weights = backend.triton_tables(x, nodes, weights)
        backend.triton_op("quadrature_update")(x, velocities, nodes, weights, scales=scales, out=out)
    else:
        torch.ops.flowbp_compiled.quadrature_update(x, velocities, nodes, weights, scales, out)
    return out


def _into(x: Tensor, velocities: Tensor, nodes: Tensor, weights: Tensor, scales: Tensor | None, out: Tensor) -> None:
    _run(x, velocities, nodes, weights, scales, out)


def _new(x: Tensor, velocities: Tensor, nodes: Tensor, weights: Tensor, scales: Tensor | None) -> Tensor:
    return _run(x, velocities, nodes, weights, scales)


def _fake(x, velocities, nodes, weights, scales):
    return torch.empty_like(x)


_op = register(_new, "quadrature_update", fake=_fake)  # its gradient: adjoints.py
_op_out = register(_into, "quadrature_update_out", mutates=("out",))
