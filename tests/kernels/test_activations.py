"""swiglu and gelu against PyTorch's own activations and torch.cat."""

import pytest
import torch
from kernels.cases import DTYPES, draw
from torch import library
from torch.nn import functional

from flowbp_kernels.activations import _gelu_backward_op, _gelu_op, _swiglu_backward_op, _swiglu_op, gelu, swiglu

SHAPES = [(1, 1), (3, 41), (2, 5, 64), (2, 3, 2, 7), (0, 4), (3, 0)]


def eager_swiglu(gate, value, *, prefix=None):
    activated = functional.silu(gate) * value
    return activated if prefix is None else torch.cat([prefix, activated], -1)


def eager_gelu(x, *, prefix=None):
    activated = functional.gelu(x, approximate="tanh")
    return activated if prefix is None else torch.cat([prefix, activated], -1)


OPS = {"swiglu": (2, swiglu, eager_swiglu), "gelu": (1, gelu, eager_gelu)}
OPERATORS = {"swiglu": (_swiglu_op.operator, _swiglu_backward_op), "gelu": (_gelu_op.operator, _gelu_backward_op)}


def problem(op, shape, prefixed, dtype=torch.float64):
    """The activated tensors; and a prefix, or None."""
    tensors = [3 * draw(*shape, dtype=dtype, seed=seed) for seed in range(OPS[op][0])]
    return tensors, draw(*shape[:-1], 6, dtype=dtype, seed=7) if prefixed else None


def value_and_gradients(call, tensors, prefix):
    leaves = [t.detach().requires_grad_() for t in tensors]
    if prefix is not None:
        prefix = prefix.detach().requires_grad_()
    result = call(*leaves, prefix=prefix)
    inputs = leaves if prefix is None else [*leaves, prefix]
    return result, *torch.autograd.grad(result, inputs, draw(*result.shape, dtype=result.dtype, seed=8))


@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "prefixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_value_and_gradients_are_those_of_pytorch(op, shape, prefixed):
    arguments = problem(op, shape, prefixed)
    for ours, theirs in zip(*(value_and_gradients(call, *arguments) for call in OPS[op][1:]), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "prefixed"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_error_is_at_most_twice_eager(op, dtype, shape, prefixed, everywhere):
    tensors, prefix = problem(op, shape, prefixed, dtype)
    ours, eager = (value_and_gradients(call, tensors, prefix) for call in OPS[op][1:])
    wide = [t.double() for t in tensors], None if prefix is None else prefix.double()
    for result, theirs, exact in zip(ours, eager, value_and_gradients(OPS[op][2], *wide), strict=True):
        assert result.dtype == dtype and result.shape == exact.shape and result.isfinite().all()
        error, allowed = (result.double() - exact).abs(), 2 * (theirs.double() - exact).abs()
        tiny = 2e-7 * exact.abs().max() if exact.numel() else 0  # eager may hit the truth by luck
        assert error.sum() <= allowed.sum() + tiny * exact.numel()
        assert not error.numel() or error.max() <= allowed.max() + tiny


@pytest.mark.parametrize("op", OPS)
def test_every_bfloat16_value_is_activated(op, everywhere):
    """NaN stays NaN; -infinity may give NaN, as PyTorch's own kernels do."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isnan() | (x.abs() < 1e30)]
    tensors = [x, torch.ones_like(x)][: OPS[op][0]]
    ours, eager = (call(*tensors) for call in OPS[op][1:])
    torch.testing.assert_close(ours, eager, rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_gradients_match_finite_differences(op):
    tensors, prefix = problem(op, (2, 5), True)
    leaves = [t.requires_grad_() for t in (*tensors, prefix)]
    assert torch.autograd.gradcheck(lambda *t: OPS[op][1](*t[:-1], prefix=t[-1]), leaves)


@pytest.mark.parametrize("op", OPS)
def test_large_inputs_stay_finite(op, everywhere):
    tensors = [torch.tensor([-1e4, -100.0, 100.0, 1e4]).half() for _ in range(OPS[op][0])]
    for result in value_and_gradients(OPS[op][1], tensors, None)[1:]:
        assert result.isfinite().all()


def test_halves_of_one_projection_are_read_where_they_lie(everywhere):
    projection = draw(2, 5, 24)
    gate, value = projection.chunk(2, -1)
    expected = swiglu(gate.contiguous(), value.contiguous())
    for halves in ((gate, value), (gate.mT.contiguous().mT, value.mT.contiguous().mT)):
        result = swiglu(*halves)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        assert result.is_contiguous()
    assert gelu(projection.mT).is_contiguous()


@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "prefixed"])
@pytest.mark.parametrize("op", OPS)
def test_the_operators_keep_the_rules_of_torch(op, prefixed):
    tensors, prefix = problem(op, (2, 5), prefixed, torch.float32)
    g = draw(2, 11)[:, 6:]
    forward, backward = OPERATORS[op]
    library.opcheck(backward, (g, *tensors))
    leaves = [t.requires_grad_() for t in tensors]
    library.opcheck(forward, (*leaves, None if prefix is None else prefix.requires_grad_()))


@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "prefixed"])
@pytest.mark.parametrize("op", OPS)
def test_they_compile_without_graph_breaks(op, prefixed):
    arguments = problem(op, (2, 5), prefixed, torch.float32)
    compiled = torch.compile(OPS[op][1], backend="aot_eager", fullgraph=True)
    for ours, plain in zip(*(value_and_gradients(call, *arguments) for call in (compiled, OPS[op][1])), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_prefix_without_gradient_gets_none():
    (x,), prefix = problem("gelu", (2, 5), True)
    gelu(x.requires_grad_(), prefix=prefix).sum().backward()
    assert x.grad is not None and prefix.grad is None
    x.requires_grad_(False)
    gelu(x, prefix=prefix.requires_grad_()).sum().backward()
    assert torch.equal(prefix.grad, torch.ones_like(prefix))


x = torch.zeros(2, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: swiglu(x, x[:1]), r"value has shape \(1, 5\) and gate \(2, 5\)"),
        (lambda: swiglu(x, x.double()), "gate is torch.float32 and value torch.float64; they must share one dtype"),
        (lambda: swiglu(x.int(), x), "gate must have a float dtype"),
        (lambda: gelu(torch.tensor(1.0)), r"x must be \[..., M\]; it has no dimension"),
        (lambda: gelu(x, prefix=x[:1]), r"prefix must be \[..., P\] like x but for the last dimension"),
        (lambda: gelu(x, prefix=x.half()), r"prefix must be \[..., P\].*torch.float16"),
        (lambda: gelu(x, prefix=x.to("meta")), "prefix is on meta and x on cpu"),
    ],
)
def test_inputs_outside_the_contract_raise_and_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
