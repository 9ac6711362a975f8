"""What attention's queries and keys go through before they meet: RMSNorm of each head, rotary embedding, and one joint
sequence of all streams, in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowbp_kernels import backend
from flowbp_kernels import network_reference as reference
from flowbp_kernels.arguments import check_float, with_whole_rows
from flowbp_kernels.modulation import CHUNK
from flowbp_kernels.operators import Recorded

Rope = Tensor | tuple[Tensor, Tensor]


def qk_norm(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    weights_q: Tensor | Sequence[Tensor | None] | None,
    weights_k: Tensor | Sequence[Tensor | None] | None,
    rope: Rope | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q = R (weight * x / sqrt(mean(x^2) + eps)) for the queries x of every stream, joined along the tokens; k of the
    keys alike. In float32 (float64 if a tensor is float64), rounded once.

    queries, keys: [B, T, H, d] of one float dtype, or two such tensors: the streams, in the order in which they are
    joined. Streams share B, H and d. Views of a fused projection are read where they lie, if d is contiguous.
    weights_q, weights_k: [d], any float dtype, or None for ones; a pair gives each stream its own.
    rope: R, which rotates neighbours (x_0, x_1) to (cos_0 x_0 - sin_0 x_1, cos_1 x_1 + sin_1 x_0). (cos, sin) of
    [T_total, d] float32 each, as in FLUX; or complex64 cos + i sin, [T_total, d/2] or [B, T_total, d/2], as in Z-Image.
    None: no rotation.
    Returns q, k [B, T_total, H, d], contiguous, in the queries' dtype.
    Gradient: to queries, keys and weights; none to rope. The backward keeps no output: it computes the mean squares
    again from the queries and keys. A weight's gradient is summed in float32, in one fixed order.
    Raises ValueError for shapes, dtypes or devices outside this contract.
    Equivalent to  q = torch.cat([F.rms_norm(x.float(), (d,), w.float(), eps) for x, w in zip(queries, weights_q)], 1);
    rotated = torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2)
    q = (q * cos[:, None] + rotated * sin[:, None]).to(queries[0].dtype)   and k alike
    """
    streams = _streams(queries, keys)
    first, _, second, _ = streams
    num_streams, total = (1, first.shape[1]) if second is None else (2, first.shape[1] + second.shape[1])
    weight_q, weight_q_2 = _weights("weights_q", weights_q, num_streams, first)
    weight_k, weight_k_2 = _weights("weights_k", weights_k, num_streams, first)
    weights = weight_q, weight_k, weight_q_2, weight_k_2
    return _op(*streams, *weights, *_tables(rope, first, total), eps)


def _streams(
    queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries, keys, and those of a second stream or None: [B, T, H, d], alike in a stream, and but for T in both."""
    each_q = [queries] if isinstance(queries, Tensor) else list(queries)
    each_k = [keys] if isinstance(keys, Tensor) else list(keys)
    if len(each_q) not in (1, 2) or len(each_q) != len(each_k):
        raise ValueError(
            f"queries and keys must both be one tensor or two, a stream each: got {len(each_q)} and {len(each_k)}; "
            "join further streams with torch.cat"
        )
    first = each_q[0]
    for name, each in (("queries", each_q), ("keys", each_k)):
        for x in each:
            check_float(name, x)
            _check_place(name, x, first)
    for query, key in zip(each_q, each_k, strict=True):
        shape = query.shape
        if len(shape) != 4 or shape[0] != first.shape[0] or shape[2:] != first.shape[2:]:
            raise ValueError(
                f"queries must be [B, T, H, d], with the same B, H and d in each stream: got {tuple(shape)} beside "
                f"{tuple(first.shape)}"
            )
        if key.shape != shape or not query.dtype == key.dtype == first.dtype:
            raise ValueError(
                f"queries and keys must share their shape in each stream, and all their dtype: got {tuple(shape)} "
                f"{query.dtype} and {tuple(key.shape)} {key.dtype} beside {first.dtype}"
            )
    if len(each_q) == 1:
        return first, each_k[0], None, None
    return first, each_k[0], each_q[1], each_k[1]


def _weights(
    name: str, weights: Tensor | Sequence[Tensor | None] | None, num_streams: int, x: Tensor
) -> Sequence[Tensor | None]:
    """Two weights, the second None where there is one stream."""
    each = [weights] * num_streams if weights is None or isinstance(weights, Tensor) else list(weights)
    if len(each) != num_streams:
        raise ValueError(f"{name} must be one weight or one a stream: got {len(each)} for {num_streams} streams")
    for weight in each:
        if weight is not None:
            check_float(name, weight)
            if weight.shape != x.shape[3:]:
                raise ValueError(f"{name} must be [d] = {list(x.shape[3:])} or None, not of shape {list(weight.shape)}")
            _check_place(name, weight, x)
    return *each, *[None] * (2 - num_streams)


def _tables(rope: Rope | None, x: Tensor, total: int) -> tuple[Tensor | None, Tensor | None]:
    """(cos, sin) [1, T, d] float32; (table, None) with a table [1 or B, T, d] of pairs (cos, sin); or (None, None)."""
    if rope is None:
        return None, None
    batch, _, _, width = x.shape
    tables = (rope,) if isinstance(rope, Tensor) else tuple(rope)
    of_pairs = len(tables) == 1
    dtype, shape = (torch.complex64, (total, width // 2)) if of_pairs else (torch.float32, (total, width))
    if width % 2:
        raise ValueError(f"a rotary embedding turns pairs, and d = {width} is odd: pass rope=None")
    for table in tables:
        shapes = (shape, (batch, *shape)) if of_pairs else (shape,)
        if len(tables) > 2 or table.dtype != dtype or table.shape not in shapes:
            raise ValueError(
                f"rope must be (cos, sin) of [T, d] = {[total, width]} float32 each, or one complex64 tensor [T, d/2] "
                f"or [B, T, d/2]; got {[(list(t.shape), t.dtype) for t in tables]}"
            )
        _check_place("rope", table, x)
    if of_pairs:
        table = torch.view_as_real(tables[0].detach().resolve_conj()).flatten(-2).contiguous()
        return (table if table.dim() == 3 else table[None]), None
    cos, sin = (table.detach().contiguous()[None] for table in tables)
    return cos, sin


def _check_place(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and the first queries on {x.device}; move them together")


def _forward(
    queries: Tensor,
    keys: Tensor,
    queries_2: Tensor | None,
    keys_2: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_q_2: Tensor | None,
    weight_k_2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tensors = queries, keys, queries_2, keys_2, weight_q, weight_k, weight_q_2, weight_k_2
    runs = _runs(*tensors)
    if runs == "triton":
        return backend.triton_op("qk_norm")(*tensors, cos, sin, eps)
    if runs == "cpu":
        q, k = _like_joint(queries, keys, queries_2)
        torch.ops.flowbp_compiled.qk_norm.default(*with_whole_rows(*tensors), cos, sin, eps, q, k)
        return q, k
    rope = None if cos is None else reference.rotation(cos, sin)
    q, k = (reference.qk_norm(streams, weights, rope, eps) for streams, weights in _pairs(*tensors))
    return q, k


def _backward(
    g_q: Tensor,
    g_k: Tensor,
    queries: Tensor,
    keys: Tensor,
    queries_2: Tensor | None,
    keys_2: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    weight_q_2: Tensor | None,
    weight_k_2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """Gradients of the streams that there are, and of the weights that there are if they are wanted; in this order."""
    tensors = queries, keys, queries_2, keys_2, weight_q, weight_k, weight_q_2, weight_k_2
    runs = _runs(*tensors)
    if runs == "triton":
        return backend.triton_op("qk_norm", "qk_norm_backward")(g_q, g_k, *tensors, cos, sin, eps, of_weights)
    if runs == "cpu":
        return _compiled_backward(g_q, g_k, *tensors, cos, sin, eps, of_weights)
    rope = None if cos is None else reference.rotation(cos, sin)
    (streams_q, weights_q), (streams_k, weights_k) = (
        reference.qk_norm_backward(g, streams, weights, rope, eps)
        for g, (streams, weights) in zip((g_q, g_k), _pairs(*tensors), strict=True)
    )
    gradients = [part for pair in zip(streams_q, streams_k, strict=True) for part in pair]
    if of_weights:
        gradients += [part for pair in zip(weights_q, weights_k, strict=True) for part in pair if part is not None]
    return gradients


def _compiled_backward(g_q, g_k, *arguments) -> list[Tensor]:
    *tensors, cos, sin, eps, of_weights = arguments
    gradients = [None if x is None else x.new_empty(x.shape) for x in tensors[:4]]
    parts = sums = None
    if of_weights:
        batch, _, heads, width = g_q.shape
        tasks = sum(batch * -(-x.shape[1] // CHUNK) for x in tensors[:4] if x is not None) if heads * width else 0
        parts, sums = (g_q.new_empty(rows, width, dtype=torch.float32) for rows in (tasks, 4))
    inputs = with_whole_rows(g_q, g_k, *tensors)
    torch.ops.flowbp_compiled.qk_norm_backward.default(*inputs, cos, sin, eps, *gradients, parts, sums)
    found = [gradient for gradient in gradients if gradient is not None]
    if sums is not None:  # copies: an operator's results share no memory
        pairs = zip(tensors[4:], sums, strict=True)
        found += [row.to(weight.dtype, copy=True) for weight, row in pairs if weight is not None]
    return found


def _runs(queries, keys, queries_2, keys_2, weight_q, weight_k, weight_q_2, weight_k_2) -> str:
    weights = {"weights_q": weight_q, "weights_k": weight_k, "weights_q[1]": weight_q_2, "weights_k[1]": weight_k_2}
    return backend.select("qk_norm", in_rows=True, queries=queries, keys=keys, **weights)


def _pairs(q, k, q_2, k_2, weight_q, weight_k, weight_q_2, weight_k_2) -> tuple[Any, Any]:
    """(streams, their weights) of the queries, and of the keys."""
    if q_2 is None:
        return ((q,), (weight_q,)), ((k,), (weight_k,))
    return ((q, q_2), (weight_q, weight_q_2)), ((k, k_2), (weight_k, weight_k_2))


def _like_joint(queries, keys, queries_2, *_):
    shape = list(queries.shape)
    if queries_2 is not None:
        shape[1] += queries_2.shape[1]
    return queries.new_empty(shape), queries.new_empty(shape)


def _like_inputs(g_q, g_k, *tensors_and_rest):
    *tensors, _, _, _, of_weights = tensors_and_rest
    wanted = tensors if of_weights else tensors[:4]
    return [t.new_empty(t.shape) for t in wanted if t is not None]


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, g_q, g_k):
    tensors, of_weights = ctx.saved_tensors, any(ctx.needs_input_grad[4:8])
    run: Any = _backward_op if backend.needs_operator(g_q, g_k, *tensors) else _backward
    found = iter(run(g_q, g_k, *tensors, ctx.eps, of_weights))
    wanted = tensors[:8] if of_weights else tensors[:4]
    gradients = [None if tensor is None else next(found) for tensor in wanted]
    return *gradients, *[None] * (11 - len(gradients))


_op = Recorded("qk_norm", _forward, _forward, _like_joint, _keep, _gradients)
_backward_op = torch.library.custom_op("flowbp_kernels::qk_norm_backward", _backward, mutates_args=())
_backward_op.register_fake(_like_inputs)
