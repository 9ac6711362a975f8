"""The references: their formulas against float64, their gradients against finite differences, their contracts."""

import math

import pytest
import torch

from flowbp_kernels import (
    bridge_cotangents,
    cfg_euler_step,
    cfg_multistep_step,
    leap_residuals,
    quadrature_update,
    straight_through,
)

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 41), (2, 3, 5, 7), (5, 4097), (0, 4), (3, 0)]
NAN = math.nan


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_rounded_once(result, exact):
    """`result` is `exact` (float64) up to float32 sums and one rounding to result's dtype."""
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(result.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_quadrature_update_matches_its_formula(dtype, shape):
    x, cache = draw(*shape, dtype=dtype), draw(4, *shape, dtype=dtype, seed=1)
    weights = torch.tensor([-0.25, 0.5, -0.75], dtype=torch.float64)
    result = quadrature_update(x, cache, [3, 1, 1], weights)
    assert result.dtype == dtype
    assert_rounded_once(result, x.double() + torch.einsum("k,k...->...", weights, cache.double()[[3, 1, 1]]))


def test_float64_stays_float64():
    x, cache = draw(2, 9), draw(3, 2, 9, seed=1)
    exact = x - cache[0] / 3
    torch.testing.assert_close(quadrature_update(x, cache, [0], [-1 / 3]), exact, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(cfg_euler_step(x, cache[0], cache[0], 2.0, -1 / 3)[0], exact, rtol=1e-15, atol=1e-15)
    step = cfg_multistep_step(x.float(), x.float(), None, 1.0, 0.0, cache, [0], [-1 / 3])[0]
    torch.testing.assert_close(step, (x.float() - cache[0] / 3).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(bridge_cotangents(x, x, [1 / 3], [0.0])[0], x / 3, rtol=1e-15, atol=1e-15)
    assert leap_residuals(x, x, x, cache.float(), [0], ([1.0], [1.0])).dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_cfg_euler_step_matches_its_formula(dtype, shape):
    x, v_cond, v_uncond = draw(*shape), draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    x = x.float()
    x_next, velocity = cfg_euler_step(x, v_cond, v_uncond, 4.5, torch.tensor(-0.04))
    assert (x_next.dtype, velocity.dtype) == (torch.float32, dtype)
    assert_rounded_once(velocity, v_uncond.double() + 4.5 * (v_cond.double() - v_uncond.double()))
    assert_rounded_once(x_next, x.double() - 0.04 * velocity.double())


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_replay_from_the_cached_velocity_meets_the_same_latent(dtype):
    x, v_cond, v_uncond = draw(3, 41).float(), draw(3, 41, dtype=dtype, seed=1), draw(3, 41, dtype=dtype, seed=2)
    x_next, velocity = cfg_euler_step(x, v_cond, v_uncond, 4.5, -0.04)
    assert torch.equal(quadrature_update(x, velocity[None], [0], [-0.04]), x_next)


@pytest.mark.parametrize("cache_dtype", [*LOW_PRECISION, torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_cfg_multistep_step_matches_its_formula(dtype, shape, cache_dtype):
    x, cache = draw(*shape, dtype=torch.float32), draw(4, *shape, seed=3).to(cache_dtype)
    v_cond, v_uncond = draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    weights = torch.tensor([-0.25, 0.5, -0.75], dtype=torch.float64)
    x_next, velocity = cfg_multistep_step(x, v_cond, v_uncond, 4.5, -0.04, cache, [3, 1, 1], weights)
    assert (x_next.dtype, velocity.dtype) == (torch.float32, dtype)
    assert_rounded_once(velocity, v_uncond.double() + 4.5 * (v_cond.double() - v_uncond.double()))
    earlier = torch.einsum("k,k...->...", weights, cache.double()[[3, 1, 1]])
    assert_rounded_once(x_next, x.double() + earlier - 0.04 * velocity.double())


def test_guidance_of_one_is_the_conditional_velocity():
    x, v_cond, v_uncond = draw(3, 41), draw(3, 41, seed=1), draw(3, 41, seed=2)
    torch.testing.assert_close(cfg_euler_step(x, v_cond, v_uncond, 1.0, -0.1)[1], v_cond)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_bridge_cotangents_match_their_formula(dtype):
    g, g_x = draw(2, 3, 5, dtype=torch.float32), draw(2, 3, 5, dtype=dtype, seed=1)
    weights, alphas = draw(4, 2, seed=2), torch.tensor([0.3, 1.0, 0.0, 0.0], dtype=torch.float64)
    result = bridge_cotangents(g, g_x, weights, alphas, dtype=dtype)
    assert (result.shape, result.dtype) == ((4, 2, 3, 5), dtype)
    exact = weights[:, :, None, None] * (g.double() + alphas[:, None, None, None] * g_x.double())
    assert_rounded_once(result, exact)
    assert bridge_cotangents(g, g_x, [], []).shape == (0, 2, 3, 5)


def test_zero_coefficients_cut_instead_of_scaling():
    g, poison = draw(2, 3), torch.full((2, 3), NAN, dtype=torch.float64)
    assert torch.equal(quadrature_update(g, poison[None], [0], [0.0]), g)
    assert torch.equal(bridge_cotangents(g, poison, [1.0], [0.0])[0], g)
    assert torch.equal(bridge_cotangents(poison, g, [0.0], [1.0])[0], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(cfg_multistep_step(g, g, None, 1.0, 0.5, poison[None], [0], [0.0])[0], 1.5 * g)
    leaf = g.clone().requires_grad_()
    straight_through(g, leaf, scale=0.0).backward(poison)
    assert torch.equal(leaf.grad, torch.zeros_like(g))


def test_zero_weights_cut_the_gradient_too():
    cache = draw(2, 2, 3).requires_grad_()
    quadrature_update(draw(2, 3), cache, [0, 1], [0.0, 0.5]).backward(torch.full((2, 3), NAN, dtype=torch.float64))
    assert torch.equal(cache.grad[0], torch.zeros(2, 3, dtype=torch.float64))
    assert cache.grad[1].isnan().all()


def test_straight_through_has_one_value_and_another_gradient():
    value = torch.tensor([1.0, -0.0, math.inf, NAN, 1e-30])
    surrogate = torch.full((5,), 6e4, dtype=torch.float16).requires_grad_()
    out = straight_through(value.requires_grad_(), surrogate, scale=0.5)
    assert torch.equal(out.view(torch.int32), value.view(torch.int32))
    out.backward(torch.arange(5.0))
    assert value.grad is None
    assert surrogate.grad.dtype == torch.float16
    assert torch.equal(surrogate.grad, 0.5 * torch.arange(5.0).half())


def test_leap_residuals_are_the_mean_gaps_of_both_leaps():
    x_k, x_j, x_end = (draw(3, 4, 5, seed=seed) for seed in range(3))
    cache, weights = draw(4, 3, 4, 5, seed=3), ([-0.2, 0.0, -0.5], [0.0, -0.4, -0.1])
    landings = torch.empty(2, 3, 4, 5, dtype=torch.float64)
    residuals = leap_residuals(x_k, x_j, x_end, cache, [0, 2, 3], weights, predictions_out=landings)
    for leap, (start, target) in enumerate([(x_k, x_j), (x_j, x_end)]):
        landing = quadrature_update(start, cache, [0, 2, 3], weights[leap])
        torch.testing.assert_close(landings[leap], landing, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(residuals[leap], (landing - target).abs().mean((1, 2)), rtol=1e-14, atol=0)
    assert leap_residuals(x_k[:0], x_j[:0], x_end[:0], cache[:, :0], [0], ([1.0], [1.0])).shape == (2, 0)


def test_leap_residuals_have_no_gradient_and_say_so():
    x = draw(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="leap_residuals has no gradient"):
        leap_residuals(x, x, x, draw(1, 2, 3), [0], ([1.0], [1.0])).sum().backward()


def test_gradients_match_finite_differences():
    x, y, z = (draw(2, 3, seed=seed).requires_grad_() for seed in range(3))
    cache = draw(3, 2, 3, seed=3).requires_grad_()
    per_sample = torch.tensor([[2, 0], [1, 1], [2, 2]])
    check = torch.autograd.gradcheck
    assert check(lambda x, cache: quadrature_update(x, cache, [2, 0, 2], [0.5, -1.0, 0.25]), (x, cache))
    assert check(lambda x, cache: quadrature_update(x, cache, per_sample, draw(3, 2, seed=4)), (x, cache))
    assert check(lambda x, y, z: cfg_euler_step(x, y, z, 4.5, -0.1), (x, y, z))
    of_all, of_each = ([2, 0, 2], [0.5, -1.0, 0.25]), (per_sample, draw(3, 2, seed=4))
    assert check(lambda *t: cfg_multistep_step(*t[:3], 4.5, -0.1, t[3], *of_all), (x, y, z, cache))
    assert check(lambda *t: cfg_multistep_step(*t[:3], 4.5, -0.1, t[3], *of_each), (x, y, z, cache))
    assert check(lambda *t: cfg_multistep_step(*t[:2], None, 4.5, -0.1, t[2], *of_each)[0], (x, y, cache))
    assert check(lambda x, y: bridge_cotangents(x, y, [0.5, -1.0], [0.3, 0.0]), (x, y))
    per_sample = draw(2, 2, seed=5)
    assert check(lambda x, y: bridge_cotangents(x, y, per_sample, [0.3, 0.0]), (x, y))
    assert check(
        lambda x, cache: quadrature_update(x, cache, [0, 1], [0.5, 1.0], scales=draw(3, 2, seed=6).float()), (x, cache)
    )


def test_second_derivatives_match_finite_differences():
    x, y = (draw(2, 3, seed=seed).requires_grad_() for seed in range(2))
    cache = draw(3, 2, 3, seed=3).requires_grad_()
    check = torch.autograd.gradgradcheck
    assert check(lambda x, cache: quadrature_update(x, cache, [2, 0], [0.5, -1.0]), (x, cache))
    assert check(lambda x, y, c: cfg_multistep_step(x, y, x, 4.5, -0.1, c, [2, 0], [0.5, -1.0]), (x, y, cache))
    assert check(lambda x, y: bridge_cotangents(x, y, [0.5, -1.0], [0.3, 0.0]), (x, y))


def test_weights_get_no_gradient():
    weights, h = draw(1).requires_grad_(), torch.tensor(-0.1, requires_grad=True)
    x = draw(2, 3)
    assert not quadrature_update(x, x[None], [0], weights).requires_grad
    assert not bridge_cotangents(x, x, weights, weights).requires_grad
    assert not cfg_euler_step(x, x, x, 1.0, h)[0].requires_grad
    assert not cfg_multistep_step(x, x, x, 1.0, h, x[None], [0], weights)[0].requires_grad


@pytest.mark.parametrize(
    "op, arguments",
    [
        (cfg_euler_step, (draw(2, 3), draw(2, 3), draw(2, 3, seed=1), 4.5, -0.1)),
        (quadrature_update, (draw(2, 3), draw(4, 2, 3, seed=1), [0, 3], [0.5, -1.0])),
        (cfg_multistep_step, (*[draw(2, 3)] * 3, 4.5, -0.1, draw(4, 2, 3, seed=1), [0, 3], [0.5, -1.0])),
        (bridge_cotangents, (draw(2, 3), draw(2, 3, seed=1), draw(4), draw(4))),
        (straight_through, (draw(2, 3), draw(2, 3, seed=1).requires_grad_(), 0.5)),
        (leap_residuals, (draw(2, 3), draw(2, 3), draw(2, 3), draw(4, 2, 3, seed=1), [0, 3], ([0.5, 0.0], [0.0, 1.0]))),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_references_compile_without_graph_breaks(op, arguments):
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), op(*arguments), rtol=0, atol=0)


x, cache, integers = torch.zeros(2, 3), torch.zeros(4, 2, 3), torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quadrature_update(x, cache[:, :1], [0], [1.0]), r"velocities must be \[N, \*x.shape\].*\(4, 1, 3\)"),
        (lambda: quadrature_update(torch.tensor(1.0), torch.zeros(4), [0], [1.0]), "velocities must be"),
        (lambda: quadrature_update(integers, cache, [0], [1.0]), "x must have a float dtype, not torch.int32"),
        (lambda: quadrature_update(x, cache, [4], [1.0]), "node 4 is not in the cache; its 4 velocities"),
        (lambda: quadrature_update(x, cache, [-1], [1.0]), "node -1 is not in the cache"),
        (lambda: quadrature_update(x, cache, [0.0], [1.0]), "nodes must be integers"),
        (lambda: quadrature_update(x, cache, [0, 1], [1.0]), "nodes has 2 rows and weights 1"),
        (lambda: quadrature_update(x, cache, [0], [[1.0, 2.0, 3.0]]), r"weights must be \[K\] or \[K, B\] with B = 2"),
        (
            lambda: quadrature_update(x, cache, [0], torch.ones(1, device="meta")),
            r"weights is on meta and the tensors on cpu.*pass weights.cpu\(\)",
        ),
        (lambda: quadrature_update(x, cache.to("meta"), [0], [1.0]), "x is on cpu and velocities on meta"),
        (lambda: cfg_euler_step(x, x[:1], x, 1.0, -0.1), r"v_cond has shape \(1, 3\) and x \(2, 3\)"),
        (lambda: cfg_euler_step(x, x, x.double(), 1.0, -0.1), "must share one dtype"),
        (
            lambda: cfg_euler_step(x, x, x, 1.0, torch.zeros(2)),
            "h must be a number or a 0-dimensional tensor, not of shape",
        ),
        (lambda: cfg_euler_step(x, x, x, torch.zeros(1), -0.1), "guidance must be a number or a 0-dimensional tensor"),
        (lambda: cfg_multistep_step(x, x, x, 1.0, -0.1, cache[0], [0], [1.0]), r"velocities must be \[N, \*x.shape\]"),
        (lambda: cfg_multistep_step(x, x, x, 1.0, -0.1, cache, [4], [1.0]), "node 4 is not in the cache"),
        (lambda: cfg_multistep_step(x, x, x, 1.0, -0.1, cache, [0, 1], [1.0]), "nodes has 2 rows and weights 1"),
        (lambda: cfg_multistep_step(x, x, x.double(), 1.0, -0.1, cache, [0], [1.0]), "must share one dtype"),
        (lambda: cfg_multistep_step(x, x, x, 1.0, "h", cache, [0], [1.0]), "h must be a real number or tensor"),
        (
            lambda: cfg_multistep_step(x, x, x, 1.0, -0.1, cache.clone().requires_grad_(), [0], [1.0], out=x.clone()),
            "writing into out records no gradient",
        ),
        (lambda: bridge_cotangents(x, x[:1], [1.0], [0.0]), "g_x has shape"),
        (lambda: bridge_cotangents(x, x, [1.0], [0.0, 0.0]), "weights has 1 rows and alphas 2"),
        (lambda: bridge_cotangents(x, x, [1.0], [0.0], dtype=torch.int32), "dtype must be a float dtype"),
        (lambda: straight_through(x, x[:1]), "they must be equal"),
        (lambda: straight_through(x, integers), "surrogate must have a float dtype"),
        (lambda: leap_residuals(x, x[:1], x, cache, [0], ([1.0], [1.0])), r"x_j has shape \(1, 3\) and x_k \(2, 3\)"),
        (lambda: leap_residuals(x, x.double(), x, cache, [0], ([1.0], [1.0])), "they must share one dtype"),
        (lambda: leap_residuals(x, x, x, cache, [0], ([1.0],)), "weights must hold two rows"),
        (lambda: leap_residuals(x, x, x, cache, [0], ([1.0], [1.0, 2.0])), r"nodes has 1 rows and weights\[1\] 2"),
        (lambda: leap_residuals(x, x, x, cache, [4], ([1.0], [1.0])), "node 4 is not in the cache"),
        (
            lambda: leap_residuals(*[x[:, :0]] * 3, cache[:, :, :0], [0], ([1.0], [1.0])),
            "no elements to take a mean over",
        ),
        (
            lambda: quadrature_update(x, cache, [0], [1.0], scales=torch.ones(4)),
            r"scales must be float32 \[N, B\] = \[4, 2\]",
        ),
        (lambda: quadrature_update(x, cache, [0], [1.0], out=torch.zeros(3, 2).T), "out must be contiguous.*strides"),
        (lambda: quadrature_update(x, cache, [0], [1.0], out=x.double()), "out must be contiguous.*torch.float32"),
        (
            lambda: quadrature_update(x.clone().requires_grad_(), cache, [0], [1.0], out=x.clone()),
            "writing into out records no gradient",
        ),
        (lambda: cfg_euler_step(x, x, x, 1.0, -0.1, velocity_out=x[:1]), "velocity_out must be contiguous"),
        (
            lambda: cfg_euler_step(x, x, None, 1.0, torch.ones((), device="meta")),
            r"h is on meta and the tensors on cpu.*pass h.cpu\(\)",
        ),
        (lambda: bridge_cotangents(x, x, [1.0], [0.0], out=x), r"out must be contiguous, of shape \[1, 2, 3\]"),
    ],
)
def test_inputs_outside_the_contract_raise_and_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
