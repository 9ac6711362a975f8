"""What every Triton launcher must satisfy; test_triton.py runs this file in a process of its own, in the interpreter or
on a GPU.

A launcher reads its rule where the tensors lie; the public ops carry a rule there that comes from the CPU.
Sizes stay below 4096 elements: the interpreter takes some 20 ms a program.
"""

import math
import os

import pytest
import torch
import triton
import triton.language as tl

import flowbp_kernels
from flowbp_kernels._triton import CARRIED, OPTIONS, carry
from flowbp_kernels._triton.bridge_cotangents import bridge_cotangents
from flowbp_kernels._triton.cfg_multistep_step import cfg_multistep_step
from flowbp_kernels._triton.leap_residuals import leap_residuals
from flowbp_kernels._triton.quadrature_update import quadrature_update
from flowbp_kernels._triton.rows import place

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
    """nodes, weights [K, columns]."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randint(NUM_CACHED, (num_nodes, columns), generator=generator)
    return nodes.to(DEVICE), torch.randn(num_nodes, columns, generator=generator).double().to(DEVICE)


def numbers(table):
    """Weights as a launcher takes them."""
    return torch.tensor(table, dtype=torch.float64, device=DEVICE)


def first_node():
    return torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)


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
    """Relative error of one rounding: half a unit in the last place. The interpreter (3.9) cuts float32 to bfloat16: a
    whole one.
    """
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
    "dtype, cache_dtype",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
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
    x, velocities, scales = (
        draw(3, 41),
        draw(NUM_CACHED, 3, 41, seed=1),
        draw(NUM_CACHED, 3, seed=2).exp() if scaled else None,
    )
    nodes, weights = rule(4, columns=3)
    weights[1, 0] = weights[2, 1] = 0
    result = quadrature_update(x, velocities, nodes, weights, scales, unwritten(3, 41))
    assert_rounded_once(result, integral(x, velocities, nodes, weights, torch.float64, scales))
    shared = nodes[:, :1].contiguous()
    assert_rounded_once(
        quadrature_update(x, velocities, shared, weights, scales),
        integral(x, velocities, shared, weights, torch.float64, scales),
    )


def test_a_row_of_weight_zero_is_not_read():
    x, velocities, scales = draw(2, 41), draw(3, 2, 41, seed=1), torch.ones(3, 2, device=DEVICE)
    velocities[1], scales[1] = NAN, NAN
    nodes = torch.tensor([[0], [1], [2]], device=DEVICE)
    weights, of_each = numbers([[0.5], [0.0], [-0.5]]), numbers([[0.5, 0.5], [0.0, 1.0], [-0.5, -0.5]])
    for cache_scales in (None, scales):
        assert quadrature_update(x, velocities, nodes, weights, cache_scales).isfinite().all()
        result = quadrature_update(x, velocities, nodes, of_each, cache_scales)
        assert result[0].isfinite().all() and result[1].isnan().all()


def test_every_float8_value_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    cache = codes.view(torch.float8_e4m3fn).reshape(1, 1, 256)
    result = quadrature_update(torch.zeros(1, 256, device=DEVICE), cache, first_node(), numbers([[1.0]]))
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
    assert cfg_multistep_step(x, x, x, 2.0, -0.1)[0].shape == shape
    assert bridge_cotangents(x, x, *rule(2)).shape == (2, *shape)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_euler_step_uses_the_velocity_that_it_stored(dtype, shape, guided):
    x, v_cond, v_uncond = (
        draw(*shape),
        draw(*shape, dtype=dtype, seed=1),
        draw(*shape, dtype=dtype, seed=2) if guided else None,
    )
    out, velocity_out = unwritten(*shape), unwritten(*shape, dtype=dtype)
    x_next, velocity = cfg_multistep_step(x, v_cond, v_uncond, 4.5, -0.04, velocity_out=velocity_out, out=out)
    assert x_next is out and velocity is velocity_out
    exact = v_uncond.double() + 4.5 * (v_cond.double() - v_uncond.double()) if guided else v_cond.double()
    assert_rounded_once(velocity, exact)
    assert_rounded_once(x_next, x.double() - 0.04 * velocity.double())
    replayed = quadrature_update(x, velocity[None], first_node(), numbers([[-0.04]]))
    assert torch.equal(replayed, x_next)


def test_an_euler_step_makes_its_outputs_and_copies_no_velocity_without_guidance():
    x, v_cond, v_uncond = draw(3, 41, dtype=torch.float16), draw(3, 41, seed=1), draw(3, 41, seed=2)
    x_next, velocity = cfg_multistep_step(x, v_cond, v_uncond, 2.0, -0.1)
    assert (x_next.dtype, velocity.dtype) == (torch.float16, torch.float32)
    assert_rounded_once(x_next, x.double() - 0.1 * velocity.double())
    assert cfg_multistep_step(x, v_cond, None, 2.0, -0.1)[1] is v_cond


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("num_nodes", [0, 1, 11])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_multistep_step_adds_the_rows_before_its_velocity(cache_dtype, num_nodes, columns):
    x, v_cond, v_uncond = (draw(2, 1041, seed=seed) for seed in range(3))
    cache, (nodes, weights) = draw(NUM_CACHED, 2, 1041, seed=3).to(cache_dtype), rule(num_nodes, columns)
    cache[4], weights[nodes == 4] = NAN, 0
    out, slot = unwritten(2, 1041), unwritten(2, 1041, dtype=torch.float16)
    cfg_multistep_step(x, v_cond, v_uncond, 4.5, -0.04, None, cache, nodes, weights, slot, out)
    assert_rounded_once(slot, v_uncond.double() + 4.5 * (v_cond.double() - v_uncond.double()))
    earlier = integral(x, cache.float(), nodes, weights, torch.float64)
    assert_rounded_once(out, earlier - 0.04 * slot.double())
    rows, own = torch.cat([cache.float(), slot.float()[None]]), torch.full_like(nodes[:1], NUM_CACHED)
    if num_nodes:
        both = torch.cat([nodes, own]), torch.cat([weights, numbers([[-0.04] * columns])])
        assert torch.equal(quadrature_update(x, rows, *both), out)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("num_nodes", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bridge_cotangents_are_float64_rounded_once(dtype, num_nodes, columns):
    g, g_x = draw(2, 1041), draw(2, 1041, dtype=dtype, seed=1)
    weights, alphas = rule(num_nodes, columns)[1], rule(num_nodes, 1, seed=3)[1]
    out = unwritten(num_nodes, 2, 1041, dtype=dtype)
    assert bridge_cotangents(g, g_x, weights, alphas, out=out) is out
    assert_rounded_once(out, weights[:, :, None] * (g.double() + alphas[:, :, None] * g_x.double()))
    assert bridge_cotangents(g, g_x, weights, alphas, dtype=dtype).equal(out)
    assert bridge_cotangents(g, g_x, weights, alphas).dtype == torch.float32


def test_zero_coefficients_cut_instead_of_scaling():
    g, poison = draw(2, 41), unwritten(2, 41)
    one, zero = numbers([[1.0]]), numbers([[0.0]])
    assert torch.equal(bridge_cotangents(g, poison, one, zero)[0], g)
    assert torch.equal(bridge_cotangents(poison, g, zero, one)[0], torch.zeros_like(g))


def leaps(shape, dtype=torch.float32, columns=1):
    """Arguments of leap_residuals: the first two nodes leap to x_j, the others to x_end; node 4 is in no leap and holds
    NaN.
    """
    latents = [draw(*shape, dtype=dtype, seed=seed) for seed in range(3)]
    velocities = draw(NUM_CACHED, *shape, dtype=dtype, seed=3)
    velocities[4] = NAN
    weights = torch.zeros(2, NUM_CACHED, columns, dtype=torch.float64, device=DEVICE)
    weights[0, :2], weights[1, 2:4] = rule(2, columns)[1], rule(2, columns, seed=4)[1]
    return (*latents, velocities, torch.arange(NUM_CACHED, device=DEVICE)[:, None], weights)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leap_residuals_are_the_mean_gaps_of_both_landings(dtype, shape, predicted):
    x_k, x_j, x_end, velocities, nodes, weights = arguments = leaps(shape, dtype, columns=shape[0] if predicted else 1)
    landings = unwritten(2, *shape, dtype=dtype) if predicted else None
    residuals = leap_residuals(*arguments, predictions_out=landings)
    exact = torch.stack(
        [integral(x, velocities, nodes, w, torch.float64) for x, w in zip((x_k, x_j), weights, strict=True)]
    )
    gaps = (exact - torch.stack([x_j, x_end]).double()).abs().flatten(2).mean(2)
    assert (residuals.shape, residuals.dtype) == ((2, shape[0]), torch.float32)
    torch.testing.assert_close(residuals.double(), gaps, rtol=1e-5, atol=1e-6)
    if predicted:
        assert_rounded_once(landings, exact)


def test_leap_residuals_read_a_scaled_float8_cache():
    x_k, x_j, x_end, velocities, nodes, weights = leaps((2, 41))
    cache, scales = velocities.to(torch.float8_e4m3fn), draw(NUM_CACHED, 2, seed=5).exp()
    ends = torch.stack(
        [integral(x, cache.float(), nodes, w, torch.float64, scales) for x, w in zip((x_k, x_j), weights, strict=True)]
    )
    gaps = (ends - torch.stack([x_j, x_end]).double()).abs().mean(2)
    torch.testing.assert_close(
        leap_residuals(x_k, x_j, x_end, cache, nodes, weights, scales).double(), gaps, rtol=1e-5, atol=1e-6
    )


def test_leap_residuals_give_the_same_bits_every_time():
    arguments = leaps((2, 3000))
    first = leap_residuals(*arguments)
    assert all(torch.equal(leap_residuals(*arguments), first) for _ in range(2 if INTERPRETED else 20))


@pytest.mark.parametrize("num_nodes, columns", [(1, 2), (25, 1), (70, 2)])
def test_a_rule_that_is_carried_to_the_device_has_the_bits_of_one_that_lies_there(num_nodes, columns, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    x_k, x_j, x_end = (draw(2, 41, seed=seed) for seed in range(3))
    cache, scales = draw(NUM_CACHED, 2, 41, seed=3).to(torch.float8_e4m3fn), draw(NUM_CACHED, 2, seed=4).exp()
    (nodes, first), (_, second) = rule(num_nodes, columns), rule(num_nodes, columns, seed=4)
    first[num_nodes // 2] = 0
    of_cpu = nodes, first, second = nodes.to(torch.int32), first.float(), second.float()  # of any dtype
    if columns == 1:
        of_cpu = tuple(table[:, 0].cpu() for table in of_cpu)
    nodes, first, second = nodes.long(), first.double(), second.double()
    mine, theirs = (torch.empty(2, 2, 41, device=DEVICE) for _ in range(2))
    for by_value, on_device in (
        (
            flowbp_kernels.quadrature_update(x_k, cache, *of_cpu[:2], scales=scales),
            quadrature_update(x_k, cache, nodes, first, scales),
        ),
        (
            flowbp_kernels.cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.1, cache, *of_cpu[:2])[0],
            cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.1, None, cache, nodes, first)[0],
        ),
        (flowbp_kernels.bridge_cotangents(x_k, x_j, *of_cpu[1:]), bridge_cotangents(x_k, x_j, first, second)),
        (
            flowbp_kernels.leap_residuals(
                x_k, x_j, x_end, cache, of_cpu[0], of_cpu[1:], scales=scales, predictions_out=mine
            ),
            leap_residuals(x_k, x_j, x_end, cache, nodes, (first, second), scales, theirs),
        ),
        (mine, theirs),
    ):
        assert torch.equal(by_value, on_device)


def test_guidance_and_step_may_lie_on_the_device():
    x, v_cond, v_uncond = (draw(2, 41, seed=seed) for seed in range(3))
    by_value, on_device = (
        cfg_multistep_step(x, v_cond, v_uncond, 4.5, -0.04),
        cfg_multistep_step(x, v_cond, v_uncond, 0.0, 0.0, numbers([4.5, -0.04])),
    )
    assert all(map(torch.equal, by_value, on_device))


@pytest.mark.parametrize("rows", [1, CARRIED // 2 - 1, CARRIED // 2, CARRIED + 1])
def test_numbers_arrive_on_the_device_as_they_were(rows):
    generator = torch.Generator().manual_seed(rows)
    nodes, weights = (
        torch.randint(2**24, (rows, 1), generator=generator),
        torch.randn(rows, 2, generator=generator).double(),
    )
    assert all(map(torch.equal, (t.cpu() for t in carry(torch.device(DEVICE), nodes, weights)), (nodes, weights)))
    nothing, arrived = carry(torch.device(DEVICE), None, weights)
    assert nothing is None and torch.equal(arrived.cpu(), weights)
    (closest,) = carry(torch.device(DEVICE), None, weights / 3)[1:]
    assert torch.equal(closest.cpu(), (weights / 3).float().double())


def test_a_node_that_is_not_in_the_cache_shows_unless_its_weight_is_zero():
    x, velocities = draw(2, 41), draw(3, 2, 41, seed=1)
    nodes = torch.tensor([[0, 0], [3, 2], [-1, 1], [2**40, 1]], device=DEVICE)
    everywhere, there = numbers([[1.0]] * 4), numbers([[1.0], [0.0], [0.0], [0.0]])
    unknown, known = quadrature_update(x, velocities, nodes, everywhere)
    assert unknown.isnan().all()
    assert torch.equal(known, x[1] + velocities[0, 1] + velocities[2, 1] + velocities[1, 1] + velocities[1, 1])
    assert torch.equal(quadrature_update(x, velocities, nodes, there), x + velocities[0])
    first, second = leap_residuals(x, x, x, velocities, nodes, (everywhere, there))
    assert first.isnan().tolist() == [True, False] and second.isfinite().all()


@triton.jit
def where(elements, last, program, size, BLOCK: tl.constexpr):
    b, i, inside = place(program, size, BLOCK)
    tl.store(elements + tl.arange(0, BLOCK), tl.where(inside, b * size + i, -1))
    tl.store(last, b)


@pytest.mark.parametrize("size", [2**31 - 1024, 2**31 - 1023, 2**31 - 1, 2**31, 2**33 + 8])
def test_samples_and_elements_count_past_32_bits(size):
    elements, sample = (
        torch.empty(1024, dtype=torch.int64, device=DEVICE),
        torch.empty(1, dtype=torch.int64, device=DEVICE),
    )
    blocks = math.ceil(size / 1024)
    for b, block in ((0, 0), (3, 0), (2, blocks // 2), (1, blocks - 1)):
        where[(1,)](elements, sample, b * blocks + block, size, 1024)
        expected = torch.arange(block * 1024, (block + 1) * 1024)
        assert sample.item() == b
        assert torch.equal(elements.cpu(), torch.where(expected < size, b * size + expected, -1))


@pytest.mark.skipif(not INTERPRETED, reason="launches are watched in the interpreter")
def test_every_launch_says_that_nothing_is_fused_unasked(monkeypatch):
    """Triton's own default changes from one version to the next."""
    from triton.runtime.interpreter import GridExecutor

    launch, options = GridExecutor.__call__, []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *args, **kwargs: options.append(kwargs) or launch(self, *args, **kwargs)
    )
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    (x, y, z), cache = (draw(2, 41, seed=seed) for seed in range(3)), draw(1, 2, 41, seed=3)
    flowbp_kernels.quadrature_update(x, cache, [0], [0.5])
    flowbp_kernels.leap_residuals(x, y, z, cache, [0], ([0.5], [0.5]))
    flowbp_kernels.cfg_euler_step(x, y, z, 4.5, -0.04)
    flowbp_kernels.cfg_multistep_step(x, y, z, 4.5, -0.04, cache, [0], [0.5])
    flowbp_kernels.bridge_cotangents(x, y, [0.5], [0.5])
    assert len(options) == 9 and all(OPTIONS.items() <= given.items() for given in options)  # 4 of them carry a rule


def fuses():
    """Whether tl.fma rounds once: on a GPU, and in the interpreter from Triton 3.9 on."""
    x, v = torch.full((1, 1), -1 - 2.0**-11, device=DEVICE), torch.full((1, 1, 1), 1 + 2.0**-12, device=DEVICE)
    return quadrature_update(x, v, first_node(), numbers([[1 + 2.0**-12]])).item() == 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_have_the_bits_of_the_compiled_ops(dtype, monkeypatch):
    """The same products and sums in the same order, each rounded once. Not bfloat16, to which the interpreter cuts
    instead of rounding.
    """
    if not {"avx512", "avx2"} & set(flowbp_kernels.backend.isas()):
        pytest.skip(flowbp_kernels.backend.unavailable("cpu") or "this processor has no fused multiply-add")
    if not fuses():
        pytest.skip(f"the interpreter of triton {triton.__version__} rounds a fused multiply-add twice")
    latents = [draw(2, 1500, dtype=dtype, seed=seed) for seed in range(3)]
    cache, (nodes, weights) = draw(NUM_CACHED, 2, 1500, dtype=dtype, seed=3), rule(11)
    rules, scales = (nodes[:, 0].cpu(), weights[:, 0].cpu()), draw(NUM_CACHED, 2, seed=4)
    float8 = cache.to(torch.float8_e4m3fn)

    def ops(choice, device):
        monkeypatch.setenv("FLOWBP_KERNELS", choice)
        x, y, z = (latent.to(device) for latent in latents)
        landings = torch.empty(2, 2, 1500, device=device)
        gaps = flowbp_kernels.leap_residuals(
            x,
            y,
            z,
            cache.to(device),
            rules[0],
            (rules[1], rules[1].flip(0)),
            scales=scales.to(device),
            predictions_out=landings,
        )
        exact = (
            flowbp_kernels.quadrature_update(x, cache.to(device), *rules),
            flowbp_kernels.quadrature_update(x, float8.to(device), *rules, scales=scales.to(device)),
            flowbp_kernels.bridge_cotangents(x, y, rules[1], rules[1].flip(0)),
            *flowbp_kernels.cfg_euler_step(x, y, z, 4.5, -0.04),
            *flowbp_kernels.cfg_multistep_step(x, y, z, 4.5, -0.04, cache.to(device), *rules),
            landings,
        )
        return [result.cpu() for result in (*exact, gaps)]

    *mine, gaps = ops("triton", DEVICE)
    *theirs, expected = ops("cpu", "cpu")
    assert all(map(torch.equal, mine, theirs))
    torch.testing.assert_close(gaps, expected, rtol=1e-6, atol=0)  # a mean over 1500 gaps, summed in another order


def test_the_public_ops_reach_these_launchers(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    x_k, x_j, x_end, velocities, nodes, weights = leaps((2, 41))
    velocities = velocities.nan_to_num()
    first, row = weights[0], weights[0, :, 0]
    for mine, expected in (
        (
            flowbp_kernels.quadrature_update(x_k, velocities, nodes[:, 0], row),
            quadrature_update(x_k, velocities, nodes, first),
        ),
        (
            flowbp_kernels.cfg_euler_step(x_k, x_j, x_end, 4.5, -0.1)[0],
            cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.1)[0],
        ),
        (
            flowbp_kernels.cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.1, velocities, nodes[:, 0], row)[0],
            cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.1, None, velocities, nodes, first)[0],
        ),
        (flowbp_kernels.bridge_cotangents(x_k, x_j, row, row), bridge_cotangents(x_k, x_j, first, first)),
        (
            flowbp_kernels.leap_residuals(x_k, x_j, x_end, velocities, nodes[:, 0], weights[..., 0]),
            leap_residuals(*leaps((2, 41))),
        ),
    ):
        assert torch.equal(mine, expected)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU; test_triton.py runs this file on one under -m gpu")
def test_one_captured_graph_serves_every_plan():
    x, velocities, step = draw(2, 1500), draw(NUM_CACHED, 2, 1500, seed=1), numbers([4.5, -0.1])
    nodes, weights = rule(3, columns=2)

    def ops():
        end = quadrature_update(x, velocities, nodes, weights)
        residuals = leap_residuals(x, end, x, velocities, nodes, (weights, weights))
        return (
            end,
            *cfg_multistep_step(x, end, velocities[0], 0.0, 0.0, step),
            *cfg_multistep_step(x, end, velocities[0], 0.0, 0.0, step, velocities, nodes, weights),
            bridge_cotangents(x, end, weights, weights),
            residuals,
        )

    ops()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops()
    x.copy_(draw(2, 1500, seed=8))
    for table, other in zip((nodes, weights, step), (*rule(3, columns=2, seed=10), numbers([2.0, -0.3])), strict=True):
        table.copy_(other)
    graph.replay()
    assert all(map(torch.equal, captured, ops()))
