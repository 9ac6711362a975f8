"""Within the transforms of torch.func and forward-mode differentiation the ops refuse, where they would be wrong."""

import pytest
import torch
from kernels.cases import OPS
from torch.autograd import forward_ad

from flowbp_kernels import leap_residuals, straight_through

CALLS = {name: (op.call, op.arguments((2, 5), 2, torch.float32, False)) for name, op in OPS.items()}
CALLS["leap_residuals"] = (lambda *a: leap_residuals(*a[:5], a[5:]), CALLS["leap_residuals"][1])  # writes nothing
CALLS["straight_through"] = (lambda *a: (straight_through(*a),), (torch.ones(2, 5), torch.zeros(2, 5)))


def total(call, x, rest):
    return sum(part.sum() for part in call(x, *rest))


@pytest.mark.parametrize("name", CALLS)
def test_transforms_are_refused_in_a_sentence(name):
    call, (x, *rest) = CALLS[name]
    transforms = {
        "jvp": lambda: torch.func.jvp(lambda x: total(call, x, rest), (x,), (torch.ones_like(x),)),
        "grad": lambda: torch.func.grad(lambda x: total(call, x, rest))(x),
        "vmap": lambda: torch.func.vmap(lambda x: total(call, x, rest))(x[None]),
    }
    for transform in transforms.values():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            transform()


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused_and_a_tensor_without_one_is_not(name):
    call, (x, *rest) = CALLS[name]
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(forward_ad.make_dual(x, torch.ones_like(x)), *rest)
        for part, expected in zip(call(x, *rest), call(x, *rest), strict=True):
            assert torch.equal(part, expected)
