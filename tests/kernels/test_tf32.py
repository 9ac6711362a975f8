"""TF32 in a function and in its gradient, and nowhere else. No GPU is needed: the switch is read where products run."""

import pytest
import torch

from flowbp_kernels import in_tf32
from flowbp_kernels.tf32 import tf32_matmuls


def switch():
    return torch.backends.cuda.matmul.fp32_precision


class Product(torch.autograd.Function):
    """2 x, which notes the switch in forward and in backward."""

    seen: list[str] = []

    @staticmethod
    def forward(ctx, x):
        Product.seen.append(switch())
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        Product.seen.append(switch())
        return 2 * g


@pytest.fixture(autouse=True)
def seen():
    Product.seen.clear()
    before = switch()
    yield Product.seen
    assert switch() == before


def test_the_switch_is_on_in_forward_and_backward_and_off_between_them(seen):
    before = switch()
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = Product.apply(in_tf32(lambda x: Product.apply(x).sin(), Product.apply(x)))
    assert switch() == before
    (g,) = torch.autograd.grad(y.sum(), x)
    assert seen == [before, "tf32", before, before, "tf32", before]  # around, within, around; and back
    torch.testing.assert_close(g, 8 * torch.cos(4 * x))
    assert torch.equal(y, 2 * torch.sin(4 * x))


def test_two_functions_of_one_input_keep_their_own(seen):
    before, x = switch(), torch.ones(2, requires_grad=True)
    (in_tf32(Product.apply, x) + Product.apply(x)).sum().backward()
    assert sorted(seen) == sorted(["tf32", before] * 2) and torch.equal(x.grad, torch.full((2,), 4.0))


def test_without_a_gradient_nothing_is_recorded(seen):
    with torch.no_grad():
        assert not in_tf32(Product.apply, torch.ones(2, requires_grad=True)).requires_grad
    assert not in_tf32(Product.apply, torch.ones(2)).requires_grad and seen == ["tf32", "tf32"]


def test_an_error_in_either_pass_leaves_the_switch_as_it_was():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("in backward")

    before = switch()
    with pytest.raises(ZeroDivisionError):
        in_tf32(lambda x: x / (1 // 0), torch.ones(2, requires_grad=True))
    y = in_tf32(Broken.apply, torch.ones(2, requires_grad=True))
    with pytest.raises(ArithmeticError, match="in backward"):
        y.sum().backward()
    assert switch() == before


def test_the_older_name_of_the_switch_reads_afterwards_as_before():
    before = switch()
    for allowed in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        with tf32_matmuls():
            assert switch() == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    torch.backends.cuda.matmul.fp32_precision = before
