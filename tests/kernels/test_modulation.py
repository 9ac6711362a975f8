"""Modulated norms and gated residuals: against PyTorch written out, in every dtype, eager and compiled."""

import contextlib

import pytest
import torch
from kernels.modulation_cases import CASES, DTYPES, EPS, arguments, values_and_gradients, wide
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flowbp_kernels import backend
from flowbp_kernels.modulation import (
    CHUNK,
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)

SHAPES = [(1, 1, 1), (2, 3, 41), (3, 17, 64), (2, 5, 300), (0, 3, 8), (2, 0, 8)]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize(
    "shape, row",
    [*((shape, "[B, D]") for shape in SHAPES), *(((2, 3, 41), row) for row in ("[1, D]", "[B, 1, D]", "[1, 1, D]"))],
    ids=str,
)
def test_in_float64_it_is_the_formula(case, shape, row):
    op, eager, kinds = case
    inputs = arguments(kinds, shape, row=row)
    for mine, exact in zip(values_and_gradients(op, inputs), values_and_gradients(eager, inputs), strict=True):
        assert mine.shape == exact.shape and mine.dtype == torch.float64
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11 if shape != (1, 1, 1) else 1e-8)


@pytest.fixture
def runs_on(everywhere):
    """Fresh tensors hold NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def test_its_gradient_is_that_of_finite_differences(case):
    op, _, kinds = case
    assert torch.autograd.gradcheck(op, arguments(kinds, (2, 3, 5)))


@pytest.mark.parametrize("shape", [(2, 3, 41), (3, 2 * CHUNK + 1, 64), (2, 5, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_error_is_at_most_twice_eager(case, dtype, shape, runs_on):
    op, eager, kinds = case
    inputs = arguments(kinds, shape, dtype)
    results, eagers = values_and_gradients(op, inputs), values_and_gradients(eager, inputs)
    for result, other, exact in zip(results, eagers, values_and_gradients(eager, wide(inputs)), strict=True):
        assert result.dtype == dtype and result.isfinite().all()
        error, allowed = (result.double() - exact).abs(), 2 * (other.double() - exact).abs()
        tiny = torch.finfo(dtype).eps * exact.abs().max() / 2  # eager may hit the truth by luck
        assert error.max() <= allowed.max() + tiny
        assert error.mean() <= allowed.mean() + tiny / 4


@pytest.mark.parametrize(
    "shape, row",
    [
        ((2, CHUNK + 1, 41), "[1, D]"),
        ((2, 5, 300), "[B, 1, D]"),
        ((3, 2, 16), "[1, 1, D]"),
        ((1, 1, 1), "[B, D]"),
        ((0, 3, 8), "[B, D]"),
        ((2, 0, 8), "[1, D]"),
    ],
    ids=str,
)
def test_one_row_may_serve_all_samples(case, shape, row, runs_on):
    op, eager, kinds = case
    inputs = arguments(kinds, shape, torch.float32, row)
    for result, exact in zip(values_and_gradients(op, inputs), values_and_gradients(eager, wide(inputs)), strict=True):
        assert result.shape == exact.shape
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-5)


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


def test_the_norm_is_of_the_sum_as_rounded(runs_on):
    inputs = arguments("xrxrr", (2, 3, 64), torch.bfloat16)
    total, out = gated_residual_layer_norm(*inputs)
    assert torch.equal(total, gated_residual(*inputs[:3]))
    assert torch.equal(out, modulated_layer_norm(total, *inputs[3:]))


def test_two_modulations_of_one_norm_are_each_of_them_alone(runs_on):
    x, *modulations = arguments("xrrrr", (2, 3, 64), torch.bfloat16)
    for mine, alone in zip(modulated_layer_norm(x, *modulations), (modulations[:2], modulations[2:]), strict=True):
        assert torch.equal(mine, modulated_layer_norm(x, *alone))


def test_views_of_one_projection_are_read_where_they_lie(case, runs_on):
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


def test_a_transposed_tensor_is_read_right(case, runs_on):
    op, _, kinds = case
    plain = arguments(kinds, (2, 3, 41), torch.float32)
    turned = [t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t for t in plain]
    for mine, other in zip(values_and_gradients(op, turned), values_and_gradients(op, plain), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(not backend.isas(), reason=backend.unavailable("cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(case, dtype, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    op, _, kinds = case
    inputs = arguments(kinds, (3, 5 * CHUNK + 1, 200), dtype)
    torch.set_num_threads(1)
    alone = values_and_gradients(op, inputs)
    torch.set_num_threads(4)
    try:
        assert all(map(torch.equal, values_and_gradients(op, inputs), alone))
    finally:
        torch.set_num_threads(2)  # as conftest.py sets them for this folder


@pytest.mark.skipif(not backend.isas(), reason=backend.unavailable("cpu"))
def test_the_compiled_op_refuses_what_would_lead_out_of_bounds(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    x, row = torch.ones(2, 3, 8), torch.ones(2, 8)
    op, op_backward = torch.ops.flowbp_compiled.modulation, torch.ops.flowbp_compiled.modulation_backward
    good = dict(x=x, gate=row, y=x, weight=row[0], shift=row, scale=row, shift_2=row, scale_2=row)
    good |= dict(
        is_layer=True, eps=EPS, total=torch.empty(2, 3, 8), out=torch.empty(2, 3, 8), out_2=torch.empty(2, 3, 8)
    )
    op(**good)
    for bad in (
        {"x": x[:1]}, {"x": x[0]}, {"x": x.mT.contiguous().mT}, {"x": x.double()}, {"y": x[:, :2]}, {"y": None},
        {"gate": row[:, :4]}, {"gate": None}, {"shift": torch.ones(3, 8)}, {"scale": None}, {"scale": x},
        {"scale_2": None}, {"shift_2": torch.ones(2, 16)[:, ::2]}, {"weight": row}, {"total": None}, {"out": x[:1]},
        {"out": None}, {"out_2": None}, {"out": x.mT.contiguous().mT}, {"out": x.double()},
    ):  # fmt: skip
        with pytest.raises((RuntimeError, IndexError)):
            op(**good | bad)
    good = dict(
        g_total=x, g=x, g_2=x, s=x, gate=row, y=x, weight=row[0], scale=row, scale_2=row, is_layer=True, eps=EPS
    )
    good |= dict(
        of_modulation=True, of_x=torch.empty(2, 3, 8), of_y=torch.empty(2, 3, 8), parts=torch.empty(5, 2, 1, 8)
    )
    op_backward(**good)
    for bad in (
        {"g_total": x[:1]}, {"g": x[0]}, {"g": None}, {"g_2": None}, {"g_2": x[:, :2]}, {"s": x[:1]}, {"s": None},
        {"gate": None}, {"gate": row[:, :4]}, {"y": x[:1]}, {"weight": row}, {"scale": torch.ones(3, 8)},
        {"scale_2": None}, {"of_x": None}, {"of_x": x[:1]}, {"of_y": x[:1]}, {"of_y": None},
        {"parts": torch.empty(4, 2, 1, 8)}, {"parts": torch.empty(5, 2, 1, 8).double()}, {"y": None},
    ):  # fmt: skip
        with pytest.raises((RuntimeError, IndexError)):
            op_backward(**good | bad)


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
