"""qk_norm against what diffusers writes in its place: a norm of each head, torch.cat, and a rotary embedding."""

import math

import pytest
import torch
from kernels.cases import DTYPES, draw
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from flowbp_kernels.qk_norm import _backward_op, _op, _tables, qk_norm

EPS = 1e-5
LENGTHS = {"one stream": (5,), "two streams": (5, 3), "an empty stream": (0, 4), "no tokens": (0,)}
ROPES = (None, "real", "complex", "complex of each sample")


def rope_of(kind, batch, total, width):
    """Angles of which no two are alike."""
    shape = (batch, total, width // 2) if kind == "complex of each sample" else (total, width // 2)
    if kind == "real":
        return draw(total, width, seed=20).cos(), draw(total, width, seed=21).sin()
    return None if kind is None else torch.polar(torch.ones(shape), draw(*shape, seed=22))


def problem(lengths, width=8, heads=3, batch=2, dtype=torch.float64, weight_dtype=None, weighted=True):
    """queries, keys, weights_q, weights_k of every stream."""
    streams = [
        [draw(batch, length, heads, width, dtype=dtype, seed=10 * which + i) for i, length in enumerate(lengths)]
        for which in range(2)
    ]
    weights = [
        [
            1 + draw(width, seed=30 + 10 * which + i).to(weight_dtype or dtype) if weighted else None
            for i in range(len(lengths))
        ]
        for which in range(2)
    ]
    return *streams, *weights


def as_diffusers(queries, keys, weights_q, weights_k, rope=None, eps=EPS):
    """RMSNorm, torch.cat and apply_rotary_emb of diffusers 0.42, written for [B, T, H, d]; all in the tensors' dtype
    but for what diffusers does in float32 or wider.
    """

    def joined(streams, weights):
        normed = []
        for x, weight in zip(streams, weights, strict=True):
            wide = torch.promote_types(x.dtype, torch.float32)
            variance = x.to(wide).pow(2).mean(-1, keepdim=True)
            y = (x * torch.rsqrt(variance + eps)).to(x.dtype)
            normed.append(y if weight is None else y * weight.to(x.dtype))
        y = torch.cat(normed, 1)
        if rope is None:
            return y
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        if isinstance(rope, tuple):
            cos, sin = (table[None, :, None, :] for table in rope)
            real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([-imaginary, real], -1).flatten(3)
            return (wide * cos + rotated * sin).to(y.dtype)
        numbers = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * rope.unsqueeze(-2)).flatten(3).to(y.dtype)

    return joined(queries, weights_q), joined(keys, weights_k)


def values_and_gradients(call, queries, keys, weights_q, weights_k, rope):
    """q, k and the gradients of all that may have one, for fixed cotangents."""
    leaves = [
        [None if t is None else t.detach().clone().requires_grad_() for t in part]
        for part in (queries, keys, weights_q, weights_k)
    ]
    results = call(*leaves, rope, eps=EPS)
    cotangents = [draw(*result.shape, dtype=result.dtype, seed=40 + i) for i, result in enumerate(results)]
    inputs = [t for part in leaves for t in part if t is not None]
    return *results, *torch.autograd.grad(results, inputs, cotangents)


def double(parts):
    return [[None if t is None else t.double() for t in part] for part in parts]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("kind", ROPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_gradients_are_those_of_diffusers(lengths, kind, weighted):
    parts, rope = problem(lengths, weighted=weighted), rope_of(kind, 2, sum(lengths), 8)
    for ours, theirs in zip(
        values_and_gradients(qk_norm, *parts, rope), values_and_gradients(as_diffusers, *parts, rope), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def assert_error_is_at_most_twice_eager(parts, rope):
    ours, eager = (values_and_gradients(call, *parts, rope) for call in (qk_norm, as_diffusers))
    for result, theirs, exact in zip(
        ours, eager, values_and_gradients(as_diffusers, *double(parts), rope), strict=True
    ):
        assert result.dtype == theirs.dtype and result.shape == theirs.shape
        error, allowed = (result.double() - exact).abs(), 2 * (theirs.double() - exact).abs()
        tiny = 1e-7 * exact.abs().max() if exact.numel() else 0  # eager may hit the truth by luck
        assert error.sum() <= allowed.sum() + tiny * exact.numel()
        assert not error.numel() or error.max() <= allowed.max() + tiny


@pytest.mark.parametrize("kind", ROPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["alike", "float32 weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_eager(dtype, weight_dtype, kind, everywhere):
    parts = problem((7, 4), 64, dtype=dtype, weight_dtype=weight_dtype)
    assert_error_is_at_most_twice_eager(parts, rope_of(kind, 2, 11, 64))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads, width", [(1, 2), (3, 6), (2, 34), (5, 128), (1, 300)])
def test_so_it_is_for_any_number_of_heads_of_any_width(heads, width, lengths, everywhere):
    for weighted in (True, False):
        parts = problem(lengths, width, heads, dtype=torch.float32, weighted=weighted)
        assert_error_is_at_most_twice_eager(parts, rope_of("real", 2, sum(lengths), width))


@pytest.mark.parametrize("batch, heads, width", [(0, 2, 4), (2, 0, 4), (2, 2, 0)])
def test_of_no_elements_all_gradients_are_zero(batch, heads, width, everywhere):
    *results, of_weight_q, of_weight_k = values_and_gradients(
        qk_norm, *problem((3,), width, heads, batch, torch.float32), None
    )
    assert all(result.shape == (batch, 3, heads, width) for result in results)
    assert torch.equal(of_weight_q, torch.zeros(width)) and torch.equal(of_weight_k, torch.zeros(width))


def test_no_compiled_result_depends_on_the_number_of_threads(isa):
    """Gradients of weights are sums over 1,386 tokens and 24 heads."""
    parts, rope = problem((300, 162), 64, 24, 3, torch.float32), rope_of("complex", 3, 462, 64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(qk_norm, *parts, rope))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ROPES, ids=str)
def test_gradients_match_finite_differences(kind):
    (queries, keys, weights_q, weights_k), rope = problem((2, 1), 4, 2), rope_of(kind, 2, 3, 4)
    leaves = [t.requires_grad_() for t in (*queries, *keys, *weights_q, *weights_k)]
    assert torch.autograd.gradcheck(lambda *t: qk_norm(t[:2], t[2:4], t[4:6], t[6:], rope, eps=EPS), leaves)


def test_an_odd_head_is_normed_and_has_no_pairs_to_rotate():
    parts = problem((5,), 41)
    for ours, theirs in zip(qk_norm(*parts, eps=EPS), as_diffusers(*parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="d = 41 is odd"):
        qk_norm(*parts, rope_of("real", 2, 5, 41))


def test_a_single_tensor_is_one_stream_and_a_single_weight_serves_all_streams():
    (queries,), (keys,), (weight,), _ = problem((5,))
    joint = qk_norm(queries, keys, weight, None)
    for ours, theirs in zip(joint, as_diffusers([queries], [keys], [weight], [None], eps=1e-6), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parts = (queries[:, :2], queries[:, 2:]), (keys[:, :2], keys[:, 2:])
    assert all(map(torch.equal, qk_norm(*parts, weight, None), joint))


def test_views_of_a_fused_projection_are_read_where_they_lie(everywhere):
    queries, keys, _ = (part.unflatten(-1, (3, 8)) for part in draw(2, 5, 3 * 24).chunk(3, -1))
    transposed = queries.mT.contiguous().mT, keys.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    expected = qk_norm(queries.contiguous(), keys.contiguous(), None, None)
    for pair in ((queries, keys), transposed):
        for ours, copied in zip(qk_norm(*pair, None, None), expected, strict=True):
            torch.testing.assert_close(ours, copied, rtol=1e-6, atol=1e-6)
            assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_hands_back_gradients_in_its_own_layout(dtype):
    """scaled_dot_product_attention takes [B, H, T, d]."""
    parts = problem((4, 3), dtype=dtype)

    def attend(call):
        def attention(*arguments, eps):
            q, k = (joint.transpose(1, 2) for joint in call(*arguments, eps=eps))
            return (torch.nn.functional.scaled_dot_product_attention(q, k, q),)

        return attention

    ours, theirs = (values_and_gradients(attend(call), *parts, None) for call in (qk_norm, as_diffusers))
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_gradients_go_where_they_are_wanted():
    """LoRA trains the projections, and no weight of a norm."""
    queries, keys, weights_q, weights_k = problem((4, 3), dtype=torch.float32)
    queries[1].requires_grad_()
    q, k = qk_norm(queries, keys, weights_q, weights_k)
    (q.sum() + k.sum()).backward()
    assert queries[1].grad is not None and queries[0].grad is None and weights_q[0].grad is None
    weights_k[1].requires_grad_()
    qk_norm(queries, keys, weights_q, weights_k)[1].sum().backward()
    assert weights_k[1].grad is not None and weights_q[1].grad is None
    assert not qk_norm(queries[0], keys[0], weights_q[0], None)[0].requires_grad


@pytest.mark.parametrize("kind", ROPES, ids=str)
def test_the_operator_keeps_the_rules_of_torch(kind):
    queries, keys, weights_q, weights_k = problem((4, 3), dtype=torch.float32)
    streams = [t.requires_grad_() for t in (queries[0], keys[0], queries[1], keys[1])]
    weights = [t.requires_grad_() for t in (weights_q[0], weights_k[0], weights_q[1])]
    cos, sin = _tables(rope_of(kind, 2, 7, 8), queries[0], 7)
    library.opcheck(_op.operator, (*streams, *weights, None, cos, sin, EPS))
    detached = [t.detach() for t in (*streams, *weights)]
    for of_weights in (True, False):
        g = draw(2, 7, 3, 8), draw(2, 7, 3, 8, seed=1)
        library.opcheck(_backward_op, (*g, *detached, None, cos, sin, EPS, of_weights))


@pytest.mark.parametrize("kind", ROPES, ids=str)
def test_it_compiles_without_graph_breaks(kind):
    parts, rope = problem((4, 3), dtype=torch.float32), rope_of(kind, 2, 7, 8)
    compiled = torch.compile(qk_norm, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(
        values_and_gradients(compiled, *parts, rope), values_and_gradients(qk_norm, *parts, rope), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_checkpointing_and_fake_tensors_see_an_ordinary_operator():
    queries, keys, weights_q, weights_k = problem((4, 3), dtype=torch.bfloat16)
    plain = values_and_gradients(qk_norm, queries, keys, weights_q, weights_k, None)

    def checkpointed(*arguments, eps):
        return checkpoint(lambda *a: qk_norm(*a, eps=eps), *arguments, use_reentrant=False)

    again = values_and_gradients(checkpointed, queries, keys, weights_q, weights_k, None)
    assert all(map(torch.equal, plain, again))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert qk_norm(queries, keys, weights_q, weights_k)[0].shape == (2, 7, 3, 8)
    assert qk_norm(*(x[0].to("meta") for x in (queries, keys)), None, None)[1].shape == (2, 4, 3, 8)


x, weight = torch.zeros(2, 5, 3, 8), torch.ones(8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: qk_norm([x] * 3, [x] * 3, weight, weight), "must both be one tensor or two.*torch.cat"),
        (lambda: qk_norm([x, x], x, weight, weight), "a stream each: got 2 and 1"),
        (lambda: qk_norm(x.int(), x, weight, weight), "queries must have a float dtype"),
        (lambda: qk_norm(x[0], x[0], weight, weight), r"queries must be \[B, T, H, d\]"),
        (lambda: qk_norm([x, x[:1]], [x, x[:1]], weight, weight), "the same B, H and d in each stream"),
        (lambda: qk_norm(x, x[:, :4], weight, weight), "queries and keys must share their shape in each stream"),
        (lambda: qk_norm(x, x.half(), weight, weight), "queries and keys must share their shape in each stream"),
        (lambda: qk_norm(x, x, weight[:4], weight), r"weights_q must be \[d\] = \[8\] or None, not of shape \[4\]"),
        (lambda: qk_norm(x, x, weight, [weight, weight]), "weights_k must be one weight or one a stream: got 2 for 1"),
        (lambda: qk_norm(x, x, weight.to("meta"), weight), "weights_q is on meta and the first queries on cpu"),
        (lambda: qk_norm(x, x, None, None, (weight, weight)), r"rope must be \(cos, sin\) of \[T, d\] = \[5, 8\]"),
        (lambda: qk_norm(x, x, None, None, torch.zeros(5, 8)), "or one complex64 tensor"),
        (lambda: qk_norm(x, x, None, None, torch.zeros(3, 5, 4, dtype=torch.complex64)), "or one complex64 tensor"),
    ],
)
def test_inputs_outside_the_contract_raise_and_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_row_of_zeros_is_normed_by_eps():
    (q, _) = qk_norm(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), weight, weight)
    assert torch.equal(q, torch.zeros(1, 1, 1, 8))
    tiny = torch.full((1, 1, 1, 8), 1e-20, requires_grad=True)
    qk_norm(tiny, tiny, weight, weight, eps=1e-6)[0].sum().backward()
    torch.testing.assert_close(tiny.grad, torch.full_like(tiny, 1 / math.sqrt(1e-6)))
