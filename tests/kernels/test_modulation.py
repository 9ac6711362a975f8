"""Modulated norms and gated residuals: against PyTorch written out, in every dtype, eager and compiled."""

import contextlib

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flowbp_kernels.modulation import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 3, 41), (3, 17, 64), (2, 5, 300), (0, 3, 8), (2, 0, 8)]
EPS = 1e-6


def rows(row):
    """[B, D] or [B, 1, D] as [B, 1, D]."""
    return row if row.dim() == 3 else row[:, None]


def layer_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + rows(scale)) + rows(shift)


def rms_norm(x, weight=None, scale=None):
    """As diffusers writes it: the statistic in float32 at least, the product in the network's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalized = (x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    normalized = normalized if weight is None else normalized * weight
    return normalized if scale is None else normalized * (1 + rows(scale))


def eager_residual_norm(residual, gate, y, shift, scale):
    total = residual + rows(gate) * y
    return total, layer_norm(total, shift, scale)


# op, what diffusers' blocks do in its place, and its arguments: x [B, T, D], r a row by sample, w a weight [D].
CASES = {
    "layer norm": (modulated_layer_norm, layer_norm, "xrr"),
    "layer norm, twice": (
        modulated_layer_norm,
        lambda x, a, b, c, d: (layer_norm(x, a, b), layer_norm(x, c, d)),
        "xrrrr",
    ),
    "RMS norm": (lambda *a: modulated_rms_norm(*a, eps=EPS), rms_norm, "xwr"),
    "RMS norm, no scale": (lambda *a: modulated_rms_norm(*a, eps=EPS), rms_norm, "xw"),
    "RMS norm, no weight": (
        lambda x, scale: modulated_rms_norm(x, None, scale, eps=EPS),
        lambda x, scale: rms_norm(x, None, scale),
        "xr",
    ),
    "gated residual": (gated_residual, lambda residual, gate, y: residual + rows(gate) * y, "xrx"),
    "gated residual, layer norm": (gated_residual_layer_norm, eager_residual_norm, "xrxrr"),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(kinds, shape, dtype=torch.float64, row="[B, D]"):
    batch, _, size = shape
    shapes = {"[B, D]": (batch, size), "[1, D]": (1, size), "[B, 1, D]": (batch, 1, size), "[1, 1, D]": (1, 1, size)}
    shapes = {"x": shape, "r": shapes[row], "w": (size,)}
    return [draw(*shapes[kind], dtype=dtype, seed=seed).requires_grad_() for seed, kind in enumerate(kinds)]


def values_and_gradients(op, inputs, dtype=None):
    """Every output, then the gradient of every input; cotangents are alike for all dtypes."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [draw(*out.shape, seed=90 + i).bfloat16().to(out.dtype) for i, out in enumerate(outputs)]
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def wide(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("row", ["[B, D]", "[1, D]", "[B, 1, D]", "[1, 1, D]"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64_it_is_the_formula(case, shape, row):
    op, eager, kinds = case
    inputs = arguments(kinds, shape, row=row)
    for mine, exact in zip(values_and_gradients(op, inputs), values_and_gradients(eager, inputs), strict=True):
        assert mine.shape == exact.shape and mine.dtype == torch.float64
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11 if shape != (1, 1, 1) else 1e-8)


def test_its_gradient_is_that_of_finite_differences(case):
    op, _, kinds = case
    assert torch.autograd.gradcheck(op, arguments(kinds, (2, 3, 5)))


@pytest.mark.parametrize("shape", [(2, 3, 41), (3, 17, 64), (2, 5, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_error_is_at_most_twice_eager(case, dtype, shape):
    op, eager, kinds = case
    inputs = arguments(kinds, shape, dtype)
    results, eagers = values_and_gradients(op, inputs), values_and_gradients(eager, inputs)
    for result, other, exact in zip(results, eagers, values_and_gradients(eager, wide(inputs)), strict=True):
        assert result.dtype == dtype
        error, allowed = (result.double() - exact).abs(), 2 * (other.double() - exact).abs()
        tiny = torch.finfo(dtype).eps * exact.abs().max() / 2  # eager may hit the truth by luck
        assert error.max() <= allowed.max() + tiny
        assert error.mean() <= allowed.mean() + tiny / 4


@pytest.mark.parametrize(
    "x_dtype, row_dtype, expected",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes_promote_and_gradients_keep_their_own(case, x_dtype, row_dtype, expected):
    op, eager, kinds = case
    inputs = [t.detach().to(row_dtype if kind in "rw" else x_dtype).requires_grad_()
              for kind, t in zip(kinds, arguments(kinds, (2, 3, 41)), strict=True)]  # fmt: skip
    outputs = values_and_gradients(op, inputs)
    exact = values_and_gradients(eager, wide(inputs))
    gradients = outputs[-len(inputs) :]
    assert all(out.dtype == expected for out in outputs[: -len(inputs)])
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    for mine, truth in zip(outputs, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2 * torch.finfo(mine.dtype).eps, atol=2e-5)


def test_the_norm_is_of_the_sum_as_rounded():
    inputs = arguments("xrxrr", (2, 3, 64), torch.bfloat16)
    total, out = gated_residual_layer_norm(*inputs)
    assert torch.equal(total, gated_residual(*inputs[:3]))
    assert torch.equal(out, modulated_layer_norm(total, *inputs[3:]))


def test_two_modulations_of_one_norm_are_each_of_them_alone():
    x, *modulations = arguments("xrrrr", (2, 3, 64), torch.bfloat16)
    for mine, alone in zip(modulated_layer_norm(x, *modulations), (modulations[:2], modulations[2:]), strict=True):
        assert torch.equal(mine, modulated_layer_norm(x, *alone))


def test_views_of_one_projection_need_no_copy(case):
    """The rows of a block are chunks of one linear layer's output; tokens are a part of a joint sequence."""
    op, _, kinds = case
    plain = arguments(kinds, (2, 3, 41), torch.float32)
    joint = {
        "x": lambda t: torch.cat([t, t, t], 1)[:, 3:6],
        "r": lambda t: torch.cat([t, t], 1)[:, 41:],
        "w": lambda t: t,
    }
    views = [joint[kind](t.detach()).requires_grad_() for kind, t in zip(kinds, plain, strict=True)]
    assert not any(view.is_contiguous() for view, kind in zip(views, kinds, strict=True) if kind != "w")
    for mine, other in zip(values_and_gradients(op, views), values_and_gradients(op, plain), strict=True):
        assert torch.equal(mine, other)


def test_a_transposed_tensor_is_read_right(case):
    op, _, kinds = case
    plain = arguments(kinds, (2, 3, 41), torch.float32)
    turned = [t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t for t in plain]
    for mine, other in zip(values_and_gradients(op, turned), values_and_gradients(op, plain), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_gradient_goes_only_where_it_is_asked_for(case):
    op, eager, kinds = case
    inputs = arguments(kinds, (2, 3, 41))
    for wanted in range(len(inputs)):
        mine, exact = ([t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)] for _ in range(2))
        for run, tensors in ((op, mine), (eager, exact)):
            outputs = run(*tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(out.square().sum() for out in outputs if out.requires_grad).backward()
        assert [t.grad is not None for t in mine] == [i == wanted for i in range(len(inputs))]
        torch.testing.assert_close(mine[wanted].grad, exact[wanted].grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nothing_uses_sends_nothing_back(used):
    for op, eager, kinds in (CASES["layer norm, twice"], CASES["gated residual, layer norm"]):
        inputs = arguments(kinds, (2, 3, 41))
        mine, exact = (
            torch.autograd.grad(run(*inputs)[used].square().sum(), inputs, materialize_grads=True)
            for run in (op, eager)
        )
        for gradient, truth in zip(mine, exact, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-11)


def saved_by(op, inputs):
    """The storages that a call keeps for its backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        outputs = op(*inputs)
    return kept, outputs


def test_backward_keeps_no_result_but_the_sum_and_no_statistic():
    x, shift, scale = arguments("xrr", (2, 3, 41))
    assert saved_by(modulated_layer_norm, (x, shift, scale))[0].keys() == {x.data_ptr(), scale.data_ptr()}
    residual, gate, y, *modulation = arguments("xrxrr", (2, 3, 41))
    kept, (total, _) = saved_by(gated_residual_layer_norm, (residual, gate.detach(), y, *modulation))
    assert kept.keys() == {gate.data_ptr(), modulation[1].data_ptr(), total.data_ptr()}
    kept, _ = saved_by(gated_residual, (residual, gate, y))
    assert kept.keys() == {gate.data_ptr(), y.data_ptr()}


class Watch(TorchDispatchMode):
    """Notes the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flowbp_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_the_operators_keep_torchs_rules(case):
    op, _, kinds = case
    with Watch() as watch:
        values_and_gradients(op, arguments(kinds, (2, 3, 8), torch.float32))
    (forward, inputs), (backward, cotangents) = watch.calls
    assert (forward._opname, backward._opname) == ("modulation", "modulation_backward")
    library.opcheck(forward, [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs])
    library.opcheck(backward, [t.detach() if isinstance(t, torch.Tensor) else t for t in cotangents])


def test_it_compiles_without_graph_breaks(case):
    op, _, kinds = case
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    inputs = arguments(kinds, (2, 3, 41), torch.bfloat16)
    for mine, other in zip(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_dtypes_are_known_without_values(case, device):
    op, _, kinds = case
    real = arguments(kinds, (2, 3, 41), torch.bfloat16)
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        fake = [torch.empty(t.shape, dtype=t.dtype, device=device, requires_grad=True) for t in real]
        outputs = op(*fake)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        known = *outputs, *torch.autograd.grad(outputs, fake, [torch.empty_like(out) for out in outputs])
    for mine, other in zip(known, values_and_gradients(op, real), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())


def test_a_checkpointed_call_has_the_same_gradient(case):
    op, _, kinds = case
    inputs = arguments(kinds, (2, 3, 41), torch.bfloat16)
    again = values_and_gradients(lambda *a: checkpoint(op, *a, use_reentrant=False), inputs)
    assert all(map(torch.equal, again, values_and_gradients(op, inputs)))


def test_under_autocast_the_tensors_are_taken_as_they_come(case):
    op, _, kinds = case
    inputs = arguments(kinds, (2, 3, 41), torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        mixed = values_and_gradients(op, inputs)
    assert all(map(torch.equal, mixed, values_and_gradients(op, inputs)))


def test_a_second_derivative_raises_instead_of_being_zero(case):
    op, _, kinds = case
    inputs = arguments(kinds, (2, 3, 4))
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (gradient, *_) = torch.autograd.grad(sum(out.pow(3).sum() for out in outputs), inputs[1], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()


def test_forward_mode_raises_instead_of_being_zero():
    x, shift, scale = (t.detach() for t in arguments("xrr", (2, 3, 4)))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        modulated_layer_norm(torch.autograd.forward_ad.make_dual(x, x), shift, scale)


def test_inputs_outside_the_contract_raise_and_say_why():
    x, row = torch.ones(2, 3, 4), torch.ones(2, 4)
    for match, call in (
        (r"x must be \[B, T, D\] with D > 0: samples, tokens, features; got \[3, 4\]",
         lambda: modulated_layer_norm(x[0], row, row)),
        (r"residual must be \[B, T, D\]", lambda: gated_residual(x[..., :0], row, x[..., :0])),
        (r"scale must be \[B, D\], .* with B, D = 2, 4 of x; got \[3, 4\]",
         lambda: modulated_layer_norm(x, row, torch.ones(3, 4))),
        (r"shift must be .* got \[2, 3, 4\]", lambda: modulated_layer_norm(x, x, row)),
        (r"gate must be .* of residual; got \[4\]", lambda: gated_residual(x, row[0], x)),
        ("scale_2 is missing", lambda: modulated_layer_norm(x, row, row, row)),
        ("shift_2 is missing", lambda: modulated_layer_norm(x, row, row, scale_2=row)),
        ("y has shape .* they must be equal", lambda: gated_residual(x, row, x[:1])),
        ("scale must have a float dtype, not torch.int64", lambda: modulated_layer_norm(x, row, row.long())),
        (r"weight must be \[D\] = \[4\] on cpu", lambda: modulated_rms_norm(x, row, eps=EPS)),
        ("gate is on meta and residual on cpu; move them together", lambda: gated_residual(x, row.to("meta"), x)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
