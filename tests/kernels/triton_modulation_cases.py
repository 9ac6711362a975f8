"""What the Triton kernels of modulation.py must satisfy; test_triton.py runs this file in a process of its own, in the
interpreter or on a GPU. The public ops are called, with FLOWBP_KERNELS=triton.
"""

import os

import pytest
import torch
from kernels.modulation_cases import CASES, DTYPES, arguments, values_and_gradients, wide

from flowbp_kernels.modulation import CHUNK, gated_residual, gated_residual_layer_norm, modulated_layer_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Every dtype in one shape, and every shape in one: a kernel widens what it loads, and then knows no dtype.
SHAPES = [((2, 3, 41), dtype) for dtype in DTYPES] + [
    ((1, 1, 16), torch.float32),
    ((2, CHUNK + 1, 64), torch.bfloat16),
    ((1, 2, 1536), torch.float16),
]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Fresh tensors hold NaN, so that an element left unwritten shows."""
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def on_device(inputs):
    return [t.detach().to(DEVICE).requires_grad_() for t in inputs]


@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
def test_its_error_is_at_most_twice_eager(case, shape, dtype):
    """The interpreter (3.9) cuts float32 to bfloat16, which loses a whole unit where a rounding loses half."""
    op, eager, kinds = case
    inputs = on_device(arguments(kinds, shape, dtype))
    cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    results, eagers = values_and_gradients(op, inputs), values_and_gradients(eager, inputs)
    for result, other, exact in zip(results, eagers, values_and_gradients(eager, wide(inputs)), strict=True):
        assert result.dtype == dtype and result.isfinite().all()
        error, allowed = (result.double() - exact).abs(), 2 * cut * (other.double() - exact).abs()
        tiny = cut * torch.finfo(dtype).eps * exact.abs().max() / 2  # eager may hit the truth by luck
        assert error.max() <= allowed.max() + tiny
        assert error.mean() <= allowed.mean() + tiny / 2


@pytest.mark.parametrize(
    "shape, row",
    [((2, CHUNK + 1, 41), "[1, D]"), ((2, 3, 41), "[B, 1, D]"), ((2, 3, 41), "[1, 1, D]"), ((1, 1, 1), "[1, D]")],
    ids=str,
)
def test_one_row_may_serve_all_samples(case, shape, row):
    op, eager, kinds = case
    inputs = on_device(arguments(kinds, shape, torch.float32, row))
    for result, exact in zip(values_and_gradients(op, inputs), values_and_gradients(eager, wide(inputs)), strict=True):
        assert result.shape == exact.shape
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-5)


def test_dtypes_promote(case):
    op, eager, kinds = case
    inputs = arguments(kinds, (2, 3, 41), torch.float16)
    inputs = on_device(t.float() if kind in "rw" else t for kind, t in zip(kinds, inputs, strict=True))
    results = values_and_gradients(op, inputs)
    for result, exact in zip(results, values_and_gradients(eager, wide(inputs)), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(result.dtype).eps, atol=2e-5)
    assert [g.dtype for g in results[-len(inputs) :]] == [t.dtype for t in inputs]


def test_strides_are_free(case):
    """Rows are parts of one projection, tokens are a part of a joint sequence, or a dimension is transposed."""
    op, _, kinds = case
    plain = on_device(arguments(kinds, (2, 3, 41), torch.float32))
    part = {"x": lambda t: torch.cat([t, t, t], 1)[:, 3:6], "r": lambda t: torch.cat([t, t], 1)[:, 41:]}
    turned = {"x": lambda t: t.mT.contiguous().mT, "r": lambda t: t.mT.contiguous().mT}
    expected = values_and_gradients(op, plain)
    for view in (part, turned):
        views = [view.get(kind, torch.clone)(t.detach()) for kind, t in zip(kinds, plain, strict=True)]
        assert not any(t.is_contiguous() for t, kind in zip(views, kinds, strict=True) if kind != "w")
        assert all(map(torch.equal, values_and_gradients(op, [t.requires_grad_() for t in views]), expected))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_nothing_is_launched_for_no_tokens(case, shape):
    op, eager, kinds = case
    inputs = on_device(arguments(kinds, shape, torch.float32))
    for result, other in zip(values_and_gradients(op, inputs), values_and_gradients(eager, inputs), strict=True):
        assert torch.equal(result, other)


def test_equal_inputs_give_equal_bits(case):
    op, _, kinds = case
    shape = (1, CHUNK + 1, 64) if INTERPRETED else (2, 3 * CHUNK, 64)
    inputs = on_device(arguments(kinds, shape, torch.float32))
    first = values_and_gradients(op, inputs)
    for _ in range(1 if INTERPRETED else 20):
        assert all(map(torch.equal, values_and_gradients(op, inputs), first))


def test_a_gradient_is_the_same_whichever_others_are_asked_for(case):
    op, _, kinds = case
    inputs = on_device(arguments(kinds, (1, CHUNK + 1, 41), torch.float32))
    expected = values_and_gradients(op, inputs)[-len(inputs) :]
    for wanted, tensor in enumerate(inputs):
        others = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
        outputs = values_and_gradients(lambda _, others=others: op(*others), [tensor])
        assert torch.equal(outputs[-1], expected[wanted])


def test_the_norm_is_of_the_sum_as_rounded():
    inputs = on_device(arguments("xrxrr", (2, 3, 64), torch.bfloat16))
    total, out = gated_residual_layer_norm(*inputs)
    assert torch.equal(total, gated_residual(*inputs[:3]))
    assert torch.equal(out, modulated_layer_norm(total, *inputs[3:]))


def test_two_modulations_of_one_norm_are_each_of_them_alone():
    x, *modulations = on_device(arguments("xrrrr", (2, 3, 64), torch.bfloat16))
    for mine, alone in zip(modulated_layer_norm(x, *modulations), (modulations[:2], modulations[2:]), strict=True):
        assert torch.equal(mine, modulated_layer_norm(x, *alone))
