"""The LoRA linear layer: against PyTorch written out and against peft, eager, compiled and watched."""

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowbp_kernels import lora_linear
from flowbp_kernels.lora_linear import _op

NAMES = ["x", "weight", "bias", "a", "b"]
SHAPES = [(3, 41), (2, 17, 64), (1, 5, 300), (7,), (0, 4), (2, 0, 8)]
SCALE = 0.7


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(shape, dtype=torch.float64, thin=None, out=13, rank=4, trained=NAMES):
    """x, weight, bias in dtype, a and b in `thin`; the branch is as large as the layer."""
    size = shape[-1]
    tensors = [
        draw(*shape, seed=0, dtype=dtype),
        (draw(out, size, seed=1) / size**0.5).to(dtype),
        draw(out, seed=2, dtype=dtype),
        (draw(rank, size, seed=3) / size**0.5).to(thin or dtype),
        (draw(out, rank, seed=4) / rank**0.5).to(thin or dtype),
    ]
    return [t.requires_grad_(name in trained) for name, t in zip(NAMES, tensors, strict=True)]


def written_out(x, weight, bias, a, b):
    return F.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T


def as_callable(x, weight, bias, a, b):
    return lora_linear(x, lambda x: F.linear(x, weight, bias), None, a, b, SCALE)


def of_weight(*tensors):
    return lora_linear(*tensors, SCALE)


FORMS = pytest.mark.parametrize("call", [of_weight, as_callable], ids=["weight", "callable"])


def value_and_gradients(call, tensors):
    value = call(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return value, *torch.autograd.grad(value, wanted, draw(*value.shape, seed=9).to(value.dtype))


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(shape, call):
    tensors = arguments(shape)
    for ours, exact in zip(value_and_gradients(call, tensors), value_and_gradients(written_out, tensors), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("trained", [NAMES, ["a", "b"], ["x"], ["x", "a"], ["weight"], ["bias", "b"]], ids="-".join)
def test_every_gradient_that_is_asked_for_is_right(call, trained):
    tensors = arguments((2, 3, 5), trained=trained)
    assert torch.autograd.gradcheck(call, tensors)
    with torch.no_grad():
        torch.testing.assert_close(call(*tensors), written_out(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_at_most_twice_that_of_peft(dtype):
    """Of value and gradients, with adapters in float32; beside a narrower network peft runs under autocast."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear

    x, weight, bias, a, b = tensors = arguments((4, 65, 96), dtype, torch.float32, out=80, rank=8)
    layer = torch.nn.Linear(96, 80, dtype=dtype)
    layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    theirs = Linear(layer, "default", peft.LoraConfig(r=8), r=8, lora_alpha=8 * SCALE)
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = a.detach(), b.detach()
    parameters = x, layer.weight, layer.bias, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = theirs(x)
        of_peft = value, *torch.autograd.grad(value, parameters, draw(*value.shape, seed=9).to(dtype))
    exact = value_and_gradients(written_out, [t.detach().double().requires_grad_() for t in tensors])
    ours = value_and_gradients(of_weight, tensors)
    for name, mine, peft_s, truth in zip(["value", *NAMES], ours, of_peft, exact, strict=True):
        assert mine.dtype == peft_s.dtype, name
        assert (mine - truth).norm() <= 2 * (peft_s - truth).norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_matrices_accumulate_in_float32_and_are_not_narrowed(dtype):
    """Small integers: every product is exact, and the sums need more bits than the network's dtype has."""
    x, weight, a, b, g = (
        torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()
        for seed, shape in enumerate([(9000, 8), (6, 8), (2, 8), (6, 2), (9000, 6)])
    )
    g_a, g_b = (g @ b).T @ x, g.T @ (x @ a.T)
    assert not torch.equal(g_a, g_a.to(dtype).double()) and g_a.abs().max() < 2**24
    a, b = a.float().requires_grad_(), b.float().requires_grad_()
    y = lora_linear(x.to(dtype), weight.to(dtype), None, a, b)
    assert y.dtype == dtype
    ours = torch.autograd.grad(y, (a, b), g.to(dtype))
    torch.testing.assert_close(ours, (g_a.float(), g_b.float()), rtol=0, atol=0)


@FORMS
def test_backward_keeps_the_input_and_the_parameters(call):
    tensors = arguments((2, 9, 16), torch.bfloat16, torch.float32, trained=["x", "a", "b"])
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        call(*tensors)
    assert kept <= {t.data_ptr() for t in tensors}


def test_frozen_matrices_and_weight_keep_no_input():
    x, *others = arguments((2, 9, 16), trained=["x"])
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        lora_linear(x, *others)
    assert x.data_ptr() not in kept


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_checkpointed_it_gives_the_same_bits(call, dtype):
    tensors = arguments((2, 9, 16), dtype, torch.float32)
    eager = value_and_gradients(call, tensors)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    again = lambda *tensors: checkpoint(call, *tensors, use_reentrant=False)  # noqa: E731
    for other in (compiled, again):
        torch.testing.assert_close(value_and_gradients(other, tensors), eager, rtol=0, atol=0)


def test_torch_accepts_the_operator():
    x, weight, bias, a, b = arguments((2, 3, 5), torch.bfloat16, torch.float32)
    library.opcheck(_op.operator, (x, weight, bias, None, a, b, SCALE))
    library.opcheck(_op.operator, (x, None, None, F.linear(x, weight, bias).detach().requires_grad_(), a, b, SCALE))


def test_shapes_and_dtypes_are_known_without_data():
    with FakeTensorMode():
        x, weight, bias, a, b = (torch.empty(s) for s in [(2, 3, 5), (7, 5), (7,), (4, 5), (7, 4)])
        y = lora_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), a.requires_grad_(), b.requires_grad_())
        (g_a,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert (y.shape, y.dtype, g_a.shape, g_a.dtype) == ((2, 3, 7), torch.bfloat16, (4, 5), torch.float32)


def test_a_strided_input_is_read_where_it_lies():
    x, *others = arguments((2, 12, 16))
    part = x[:, 3:]
    torch.testing.assert_close(of_weight(part, *others), written_out(part, *others))


@FORMS
def test_autocast_casts_as_it_casts_a_linear_layer(call):
    tensors = arguments((2, 9, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, *gradients = value_and_gradients(call, tensors)
        plain = written_out(*tensors)
    narrow = [t.detach().bfloat16() for t in tensors[:3]]
    torch.testing.assert_close(value, of_weight(*narrow, *tensors[3:]), rtol=0, atol=0)
    assert value.dtype == plain.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}


def test_it_has_no_second_derivative():
    x, *others = arguments((2, 3, 5))
    (g,) = torch.autograd.grad(of_weight(x, *others).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, dtype=torch.long)}, "x must have a float dtype, not torch.int64"),
        ({"x": torch.zeros(3, 4)}, r"a must be \[r, in\] and b \[out, r\].*x \[3, 4\]"),
        ({"x": torch.tensor(1.0)}, r"x of shape \[\*, in\]"),
        ({"a": torch.zeros(3, 5)}, r"a must be \[r, in\] and b \[out, r\]"),
        ({"weight": torch.zeros(6, 5)}, r"weight must have shape \[7, 5\], by a and b; got \[6, 5\]"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \[7\]"),
        ({"weight": torch.zeros(7, 5).bfloat16()}, "weight is torch.bfloat16 and x torch.float32; convert x"),
        ({"b": torch.zeros(7, 4, device="meta")}, "b is on meta and x on cpu"),
        ({"weight": lambda x: x}, r"weight\(x\) must have shape \[3, 7\]"),
        ({"weight": lambda x: x @ torch.zeros(5, 7)}, "bias must be None where weight is a callable"),
    ],
)
def test_input_outside_the_contract_is_refused(change, message):
    given = dict(
        x=torch.zeros(3, 5), weight=torch.zeros(7, 5), bias=torch.zeros(7), a=torch.zeros(4, 5), b=torch.zeros(7, 4)
    )
    with pytest.raises(ValueError, match=message):
        lora_linear(**given | change)
