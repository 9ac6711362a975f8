"""What every Triton launcher must satisfy; test_triton.py runs this file in a process of its own, in the interpreter or on a GPU.

Sizes stay below 4096 elements: the interpreter takes some 20 ms a program.
"""

import math
import os

import pytest
import torch

import flowbp_kernels
from flowbp_kernels._triton.bridge_cotangents import bridge_cotangents
from flowbp_kernels._triton.cfg_euler_step import cfg_euler_step
from flowbp_kernels._triton.leap_residuals import leap_residuals
from flowbp_kernels._triton.quadrature_update import quadrature_update

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 41), (2, 1500), (2, 3, 4, 5)]
NAN = math.nan
NUM_CACHED = 5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def unwritten(*shape, dtype=torch.float32):
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


def rule(num_nodes, columns=1, seed=9):
    """nodes, weights [K, columns]: CPU tables, as the launchers take them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NUM_CACHED, (num_nodes, columns), generator=generator), torch.randn(num_nodes, columns, generator=generator)


def integral(x, velocities, nodes, weights, dtype, scales=None):
    """x + sum_k w_k s v, node after node in `dtype`; a weight of zero skips."""
    total = x.to(dtype)
    for node, weight in zip(nodes.expand(-1, len(x)), weights.expand(-1, len(x)), strict=True):
        for b in range(len(x)):
            if weight[b] != 0:
                scale = 1 if scales is None else scales[node[b], b].to(dtype)
                total[b] = total[b] + weight[b].to(DEVICE, dtype) * scale * velocities[node[b], b].to(dtype)
    return total


def rounding(dtype):
    """Relative error of one rounding: half a unit in the last place. The interpreter (3.9) cuts float32 to bfloat16: a whole one."""
    half = torch.finfo(dtype).eps / 2
    return 2 * half if INTERPRETED and dtype == torch.bfloat16 else half


def assert_rounded_once(result, exact):
    """`result` is `exact`, in float64, up to float32 sums and one rounding."""
    assert result.isfinite().all() and exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=1.01 * rounding(result.dtype), atol=4e-6)


@pytest.mark.parametrize("num_nodes", [0, 1, NUM_CACHED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quadrature_update_is_float64_rounded_once(dtype, shape, num_nodes):
    x, velocities = draw(*shape, dtype=dtype), draw(NUM_CACHED, *shape, dtype=dtype, seed=1)
    nodes, weights = rule(num_nodes)
    out = unwritten(*shape, dtype=dtype)
    assert quadrature_update(x, velocities, nodes, weights, out=out) is out
    assert_rounded_once(out, integral(x, velocities, nodes, weights, torch.float64))
    if dtype == torch.float32:
        torch.testing.assert_close(out, integral(x, velocities, nodes, weights, torch.float32), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "dtype, cache_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_quadrature_update_takes_a_cache_of_another_dtype(dtype, cache_dtype):
    x, velocities = draw(3, 41, dtype=dtype), draw(NUM_CACHED, 3, 41, dtype=cache_dtype, seed=1)
    result = quadrature_update(x, velocities, *rule(3))
    assert result.dtype == dtype
    assert_rounded_once(result, integral(x, velocities, *rule(3), torch.float64))


def test_the_error_is_at_most_twice_that_of_an_eager_loop():
    for dtype in (torch.float32, torch.float16):
        x, velocities = draw(2, 1500, dtype=dtype), draw(NUM_CACHED, 2, 1500, dtype=dtype, seed=1)
        nodes, weights = rule(NUM_CACHED)
        exact, eager = integral(x, velocities, nodes, weights, torch.float64), x
        for node, weight in zip(nodes[:, 0].tolist(), weights[:, 0].tolist(), strict=True):
            eager = eager + weight * velocities[node]
        error = (quadrature_update(x, velocities, nodes, weights).double() - exact).abs()
        assert error.max() <= 2 * (eager.double() - exact).abs().max()
        assert error.sum() <= 2 * (eager.double() - exact).abs().sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_each_sample_may_have_a_rule_of_its_own(scaled):
    x, velocities, scales = draw(3, 41), draw(NUM_CACHED, 3, 41, seed=1), draw(NUM_CACHED, 3, seed=2).exp() if scaled else None
    nodes, weights = rule(4, columns=3)
    weights[1, 0] = weights[2, 1] = 0
    result = quadrature_update(x, velocities, nodes, weights, scales, unwritten(3, 41))
    assert_rounded_once(result, integral(x, velocities, nodes, weights, torch.float64, scales))
    shared_nodes = quadrature_update(x, velocities, nodes[:, :1], weights, scales)
    assert_rounded_once(shared_nodes, integral(x, velocities, nodes[:, :1], weights, torch.float64, scales))


def test_a_row_of_weight_zero_is_not_read():
    x, velocities, scales = draw(2, 41), draw(3, 2, 41, seed=1), torch.ones(3, 2, device=DEVICE)
    velocities[1], scales[1] = NAN, NAN
    nodes, weights = torch.tensor([[0], [1], [2]]), torch.tensor([[0.5], [0.0], [-0.5]])
    of_each = torch.tensor([[0.5, 0.5], [0.0, 1.0], [-0.5, -0.5]])
    for cache_scales in (None, scales):
        assert quadrature_update(x, velocities, nodes, weights, cache_scales).isfinite().all()
        result = quadrature_update(x, velocities, nodes, of_each, cache_scales)
        assert result[0].isfinite().all() and result[1].isnan().all()


def test_every_float8_value_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    cache = codes.view(torch.float8_e4m3fn).reshape(1, 1, 256)
    result = quadrature_update(torch.zeros(1, 256, device=DEVICE), cache, torch.tensor([[0]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(result, cache[0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float8_cache_is_scaled_by_step_and_sample(dtype):
    x, scales = draw(3, 41, dtype=dtype), draw(NUM_CACHED, 3, seed=2).exp()
    cache = draw(NUM_CACHED, 3, 41, seed=1).to(torch.float8_e4m3fn)
    result = quadrature_update(x, cache, *rule(3), scales, unwritten(3, 41, dtype=dtype))
    assert_rounded_once(result, integral(x, cache.float(), *rule(3), torch.float64, scales))


def test_quadrature_update_may_write_over_its_latent():
    x, velocities = draw(2, 1500), draw(NUM_CACHED, 2, 1500, seed=1)
    expected = quadrature_update(x, velocities, *rule(3))
    assert torch.equal(quadrature_update(x, velocities, *rule(3), out=x), expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_nothing_is_launched_for_no_elements(shape):
    x, velocities = draw(*shape), draw(NUM_CACHED, *shape)
    assert quadrature_update(x, velocities, *rule(2)).shape == shape
    assert cfg_euler_step(x, x, x, 2.0, -0.1)[0].shape == shape
    assert bridge_cotangents(x, x, *rule(2)).shape == (2, *shape)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cfg_euler_step_uses_the_velocity_that_it_stored(dtype, shape, guided):
    x, v_cond, v_uncond = draw(*shape), draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2) if guided else None
    out, velocity_out = unwritten(*shape), unwritten(*shape, dtype=dtype)
    x_next, velocity = cfg_euler_step(x, v_cond, v_uncond, 4.5, -0.04, velocity_out, out)
    assert x_next is out and velocity is velocity_out
    exact = v_uncond.double() + 4.5 * (v_cond.double() - v_uncond.double()) if guided else v_cond.double()
    assert_rounded_once(velocity, exact)
    assert_rounded_once(x_next, x.double() - 0.04 * velocity.double())
    replayed = quadrature_update(x, velocity[None], torch.tensor([[0]]), torch.tensor([[-0.04]]))
    assert torch.equal(replayed, x_next)


def test_cfg_euler_step_makes_its_outputs_and_copies_no_velocity_without_guidance():
    x, v_cond, v_uncond = draw(3, 41, dtype=torch.float16), draw(3, 41, seed=1), draw(3, 41, seed=2)
    x_next, velocity = cfg_euler_step(x, v_cond, v_uncond, 2.0, -0.1)
    assert (x_next.dtype, velocity.dtype) == (torch.float16, torch.float32)
    assert_rounded_once(x_next, x.double() - 0.1 * velocity.double())
    assert cfg_euler_step(x, v_cond, None, 2.0, -0.1)[1] is v_cond


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("num_nodes", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bridge_cotangents_are_float64_rounded_once(dtype, num_nodes, columns):
    g, g_x = draw(2, 1041), draw(2, 1041, dtype=dtype, seed=1)
    weights, alphas = rule(num_nodes, columns)[1], rule(num_nodes, 1, seed=3)[1]
    out = unwritten(num_nodes, 2, 1041, dtype=dtype)
    assert bridge_cotangents(g, g_x, weights, alphas, out=out) is out
    wide = weights.double().to(DEVICE)[:, :, None], alphas.double().to(DEVICE)[:, :, None]
    assert_rounded_once(out, wide[0] * (g.double() + wide[1] * g_x.double()))
    assert bridge_cotangents(g, g_x, weights, alphas, dtype=dtype).equal(out)
    assert bridge_cotangents(g, g_x, weights, alphas).dtype == torch.float32


def test_zero_coefficients_cut_instead_of_scaling():
    g, poison = draw(2, 41), unwritten(2, 41)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert torch.equal(bridge_cotangents(g, poison, one, zero)[0], g)
    assert torch.equal(bridge_cotangents(poison, g, zero, one)[0], torch.zeros_like(g))


def leaps(shape, dtype=torch.float32, columns=1):
    """Arguments of leap_residuals: the first two nodes leap to x_j, the others to x_end; node 4 is in no leap and holds NaN."""
    latents = [draw(*shape, dtype=dtype, seed=seed) for seed in range(3)]
    velocities = draw(NUM_CACHED, *shape, dtype=dtype, seed=3)
    velocities[4] = NAN
    weights = torch.zeros(2, NUM_CACHED, columns)
    weights[0, :2], weights[1, 2:4] = rule(2, columns)[1], rule(2, columns, seed=4)[1]
    return (*latents, velocities, torch.arange(NUM_CACHED)[:, None], weights)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leap_residuals_are_the_mean_gaps_of_both_landings(dtype, shape, predicted):
    x_k, x_j, x_end, velocities, nodes, weights = arguments = leaps(shape, dtype, columns=shape[0] if predicted else 1)
    landings = unwritten(2, *shape, dtype=dtype) if predicted else None
    residuals = leap_residuals(*arguments, predictions_out=landings)
    exact = torch.stack([integral(x, velocities, nodes, w, torch.float64) for x, w in zip((x_k, x_j), weights, strict=True)])
    gaps = (exact - torch.stack([x_j, x_end]).double()).abs().flatten(2).mean(2)
    assert (residuals.shape, residuals.dtype) == ((2, shape[0]), torch.float32)
    torch.testing.assert_close(residuals.double(), gaps, rtol=1e-5, atol=1e-6)
    if predicted:
        assert_rounded_once(landings, exact)


def test_leap_residuals_read_a_scaled_float8_cache():
    x_k, x_j, x_end, velocities, nodes, weights = leaps((2, 41))
    cache, scales = velocities.to(torch.float8_e4m3fn), draw(NUM_CACHED, 2, seed=5).exp()
    ends = torch.stack([integral(x, cache.float(), nodes, w, torch.float64, scales) for x, w in zip((x_k, x_j), weights, strict=True)])
    gaps = (ends - torch.stack([x_j, x_end]).double()).abs().mean(2)
    torch.testing.assert_close(leap_residuals(x_k, x_j, x_end, cache, nodes, weights, scales).double(), gaps, rtol=1e-5, atol=1e-6)


def test_leap_residuals_give_the_same_bits_every_time():
    arguments = leaps((2, 3000))
    first = leap_residuals(*arguments)
    assert all(torch.equal(leap_residuals(*arguments), first) for _ in range(2 if INTERPRETED else 20))


def test_the_public_ops_reach_these_launchers(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    x_k, x_j, x_end, velocities, nodes, weights = leaps((2, 41))
    velocities = velocities.nan_to_num()
    first = weights[0]
    for mine, expected in (
        (flowbp_kernels.quadrature_update(x_k, velocities, nodes[:, 0], first[:, 0]), quadrature_update(x_k, velocities, nodes, first)),
        (flowbp_kernels.cfg_euler_step(x_k, x_j, x_end, 4.5, -0.1)[0], cfg_euler_step(x_k, x_j, x_end, 4.5, -0.1)[0]),
        (flowbp_kernels.bridge_cotangents(x_k, x_j, first[:, 0], first[:, 0]), bridge_cotangents(x_k, x_j, first, first)),
        (flowbp_kernels.leap_residuals(x_k, x_j, x_end, velocities, nodes[:, 0], weights[..., 0]), leap_residuals(*leaps((2, 41)))),
    ):
        assert torch.equal(mine, expected)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU; test_triton.py runs this file on one under -m gpu")
def test_every_op_is_captured_in_a_cuda_graph():
    x, velocities = draw(2, 1500), draw(NUM_CACHED, 2, 1500, seed=1)
    nodes, weights = rule(3, columns=2)

    def ops():
        end = quadrature_update(x, velocities, nodes, weights)
        return (end, *cfg_euler_step(x, end, velocities[0], 4.5, -0.1), bridge_cotangents(x, end, weights, weights)), leap_residuals(
            x, end, x, velocities, nodes, torch.stack([weights, weights])
        )

    ops()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops()
    x.copy_(draw(2, 1500, seed=8))
    graph.replay()
    for mine, expected in zip((*captured[0], captured[1]), (*(again := ops())[0], again[1]), strict=True):
        assert torch.equal(mine, expected)
