"""What the Triton launchers of qk_norm, swiglu and gelu must satisfy; test_triton.py runs this file in a process of its
own, in the interpreter or on a GPU.
"""

import pytest
import torch
from kernels.triton_cases import DEVICE, DTYPES, draw, rounding
from torch.utils._python_dispatch import TorchDispatchMode

from flowbp_kernels import network_reference as reference
from flowbp_kernels._triton import qk_norm
from flowbp_kernels.activations import gelu as public_gelu
from flowbp_kernels.activations import swiglu as public_swiglu
from flowbp_kernels.qk_norm import _tables
from flowbp_kernels.qk_norm import qk_norm as public_qk_norm

EPS = 1e-5
ROPES = (None, "real", "complex", "complex of each sample")


def rope_of(kind, batch, total, width):
    """Angles of which no two are alike."""
    shape = (batch, total, width // 2) if kind == "complex of each sample" else (total, width // 2)
    if kind == "real":
        return draw(total, width, seed=20).cos(), draw(total, width, seed=21).sin()
    return None if kind is None else torch.polar(torch.ones(shape, device=DEVICE), draw(*shape, seed=22))


def problem(lengths=(3, 2), heads=3, width=8, batch=2, dtype=torch.float32, weight_dtype=torch.float32, rope=None):
    """Arguments of the launcher."""
    streams, weights = [None] * 4, [None] * 4
    for i, length in enumerate(lengths):
        for which in range(2):
            seed = 2 * i + which
            streams[seed] = draw(batch, length, heads, width, dtype=dtype, seed=seed)
            weights[seed] = (1 + draw(width, seed=10 + seed)).to(weight_dtype)
    return *streams, *weights, *_tables(rope_of(rope, batch, sum(lengths), width), streams[0], sum(lengths)), EPS


def cotangents(arguments):
    queries, _, queries_2, *_ = arguments
    total = queries.shape[1] + (0 if queries_2 is None else queries_2.shape[1])
    shape = len(queries), total, *queries.shape[2:]
    return tuple(draw(*shape, dtype=queries.dtype, seed=seed) for seed in (30, 31))


def exact(arguments, g=None):
    """q and k in float64; or, for cotangents g, the gradients in the launcher's order."""
    *tensors, cos, sin, eps = (a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
    rope = None if cos is None else reference.rotation(cos, sin)
    each = [
        (
            [x for x in tensors[which:4:2] if x is not None],
            [w for w in tensors[4 + which :: 2]][: 1 + (tensors[2] is not None)],
        )
        for which in range(2)
    ]
    if g is None:
        return [reference.qk_norm(*part, rope, eps) for part in each]
    streams, weights = zip(
        *(reference.qk_norm_backward(h.double(), *part, rope, eps) for h, part in zip(g, each, strict=True)),
        strict=True,
    )
    gradients = [part for kind in (streams, weights) for pair in zip(*kind, strict=True) for part in pair]
    return [gradient for gradient in gradients if gradient is not None]


def assert_rounded_once(result, expected):
    """`result` is `expected`, in float64, up to float32 arithmetic and one rounding."""
    assert result.shape == expected.shape and result.isfinite().all()
    torch.testing.assert_close(result.double(), expected, rtol=1.01 * rounding(result.dtype) + 1e-6, atol=2e-5)


def check(arguments, g=None):
    """Forward and backward; returns their results."""
    g = cotangents(arguments) if g is None else g
    results = *qk_norm.qk_norm(*arguments), *qk_norm.qk_norm_backward(*g, *arguments, True)
    for result, expected in zip(results, (*exact(arguments), *exact(arguments, g)), strict=True):
        assert_rounded_once(result, expected)
    return results


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("lengths", [(5,), (3, 2), (0, 6)], ids=str)
def test_qk_norm_is_float64_rounded_once(lengths, rope):
    for result in check(problem(lengths, rope=rope)):
        assert result.is_contiguous()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_takes_each_dtype_beside_each_dtype_of_weights(dtype, weight_dtype):
    arguments = problem((3, 2), dtype=dtype, weight_dtype=weight_dtype, rope="real")
    results = check(arguments)
    assert [r.dtype for r in results] == [dtype] * 6 + [weight_dtype] * 4


@pytest.mark.parametrize("heads, width", [(1, 1), (5, 41), (3, 64), (10, 128), (2, 1000)])
def test_qk_norm_takes_any_number_of_heads_of_any_width(heads, width):
    rope = "real" if width % 2 == 0 else None
    check(problem((1, 1), heads, width, 1, dtype=torch.float32, rope=rope))


def test_a_weight_may_be_missing_or_of_another_dtype():
    *streams, weight_q, weight_k, weight_q_2, weight_k_2, cos, sin, eps = problem()
    check((*streams, weight_q, None, None, weight_k_2, cos, sin, eps))
    check((*streams, weight_q, weight_k.half(), weight_q_2.bfloat16(), weight_k_2, cos, sin, eps))
    check((*streams, None, None, None, None, cos, sin, eps))


def test_streams_and_cotangents_are_read_where_they_lie():
    """Views of a fused projection, at odd offsets; and gradients as attention hands them back, [B, H, T, d]."""
    queries, keys, queries_2, keys_2, *rest = problem((3, 2), width=6)
    fused = [draw(2, length, 3 * 18 + 1, seed=seed)[..., 1:].chunk(3, -1) for seed, length in ((1, 3), (2, 2))]
    views = [part.unflatten(-1, (3, 6)) for parts in fused for part in parts[:2]]
    g = [draw(2, 3, 5, 6, seed=seed).transpose(1, 2) for seed in (3, 4)]
    check((*views, *rest), g)
    check((queries, views[1], views[2].mT.contiguous().mT, keys_2, *rest), (g[0], g[1].contiguous()))


@pytest.mark.parametrize("lengths", [(5,), (3, 2)], ids=str)
def test_a_pass_over_all_streams_is_one_launch(lengths, monkeypatch):
    """Nothing but memory is asked of torch."""
    launches, calls = [], set()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launches.append(self.name)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.add(function)
            return function(*args, **(kwargs or {}))

    arguments = problem(lengths, rope="real")
    g = cotangents(arguments)
    for name in ("kernel", "backward_kernel"):
        monkeypatch.setattr(qk_norm, name, Launch(name))
    with Calls():
        qk_norm.qk_norm(*arguments)
        qk_norm.qk_norm_backward(*g, *arguments, False)
    assert launches == ["kernel", "backward_kernel"] and calls == {torch.ops.aten.new_empty.default}


def test_gradients_of_weights_are_computed_where_they_are_wanted_and_with_equal_bits():
    arguments = problem((9, 5))
    g = cotangents(arguments)
    first, again = (qk_norm.qk_norm_backward(*g, *arguments, True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    frozen = qk_norm.qk_norm_backward(*g, *arguments, False)
    assert len(frozen) == 4 and all(map(torch.equal, frozen, first[:4]))


@pytest.mark.parametrize("batch, lengths, heads", [(0, (3,), 2), (2, (0,), 2), (2, (3, 2), 0)])
def test_no_elements_have_gradients_of_zero(batch, lengths, heads):
    arguments = problem(lengths, heads, batch=batch)
    for gradient in qk_norm.qk_norm_backward(*cotangents(arguments), *arguments, True)[2 * len(lengths) :]:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert qk_norm.qk_norm(*arguments)[0].numel() == 0


ACTIVATIONS = {"swiglu": (2, public_swiglu), "gelu": (1, public_gelu)}
SHAPES = [(1, 1), (3, 41), (2, 1500), (2, 3, 2, 7)]


def activated(op, tensors, prefix=None, g=None):
    """The result, and the gradients of the tensors and of the prefix for a cotangent g, by default of ones."""
    leaves = [t.detach().requires_grad_() for t in (*tensors, *([] if prefix is None else [prefix]))]
    result = ACTIVATIONS[op][1](*leaves[: len(tensors)], prefix=None if prefix is None else leaves[-1])
    return result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result) if g is None else g)


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")


@pytest.mark.parametrize("prefix", [None, 6, 1030], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activations_are_float64_rounded_once(op, dtype, shape, prefix, on_triton, monkeypatch):
    tensors = [3 * draw(*shape, dtype=dtype, seed=seed) for seed in range(ACTIVATIONS[op][0])]
    front = None if prefix is None else draw(*shape[:-1], prefix, dtype=dtype, seed=8)
    g = draw(*shape[:-1], (prefix or 0) + shape[-1], dtype=dtype, seed=9)
    ours = activated(op, tensors, front, g)
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")
    wide = [t.double() for t in tensors], None if front is None else front.double(), g.double()
    for result, expected in zip(ours, activated(op, *wide), strict=True):
        assert result.dtype == dtype
        assert_rounded_once(result, expected)
    if front is not None:
        assert torch.equal(ours[0][..., :prefix], front) and torch.equal(ours[-1], g[..., :prefix])


def test_activations_of_large_numbers_are_finite(on_triton):
    x = torch.tensor([-6e4, -100.0, 100.0, 6e4], device=DEVICE)
    for op, tensors in (("gelu", [x]), ("swiglu", [x, torch.ones_like(x)])):
        result, of_x, *_ = activated(op, tensors)
        assert torch.equal(result, x.relu()) and torch.equal(of_x, (x > 0).float())


def test_activations_read_strided_rows_and_copy_what_has_none(on_triton):
    gate, value = draw(2, 3, 13)[..., 1:].chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * value
    for halves in ((gate, value), (gate.transpose(0, 1).contiguous().transpose(0, 1), value.mT.contiguous().mT)):
        torch.testing.assert_close(public_swiglu(*halves), expected, rtol=1e-6, atol=1e-6)
    assert public_swiglu(gate[:0], value[:0]).shape == (0, 3, 6)
    assert torch.equal(public_gelu(gate[..., :0], prefix=value), value)


def test_the_public_ops_reach_these_launchers(monkeypatch):
    queries, keys, queries_2, keys_2, *weights, _, _, _ = problem()
    leaves = [t.requires_grad_() for t in (queries, keys, queries_2, keys_2, *weights)]
    x, prefix = draw(2, 5).requires_grad_(), draw(2, 3, seed=1).requires_grad_()

    def ops():
        joint = public_qk_norm(
            leaves[:4:2], leaves[1:4:2], leaves[4::2], leaves[5::2], rope_of("real", 2, 5, 8), eps=EPS
        )
        results = *joint, public_gelu(x, prefix=prefix), public_swiglu(x, 2 * x, prefix=prefix)
        loss = sum((result * result.detach().cos()).sum() for result in results)
        return *results, *torch.autograd.grad(loss, [*leaves, x, prefix])

    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    mine = ops()
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")
    for result, expected in zip(mine, ops(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)
