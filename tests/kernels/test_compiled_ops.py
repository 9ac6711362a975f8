"""Every op on the compiled CPU kernels of each instruction set, against float64 and against what one writes without
it.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import DTYPES, NUM_CACHED, OPS, SHAPES, draw, rule
from torch import library
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flowbp_kernels import (
    backend,
    bridge_cotangents,
    cfg_euler_step,
    cfg_multistep_step,
    leap_residuals,
    quadrature_update,
)

ISAS = backend.isas()

pytestmark = pytest.mark.skipif(not ISAS, reason=backend.unavailable("cpu"))


@pytest.fixture
def nan_filled():
    """Fresh tensors hold NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def exact(op, arguments, monkeypatch):
    """In float64, on the reference; rules keep their values."""
    with monkeypatch.context() as patch:
        patch.setenv("FLOWBP_KERNELS", "reference")
        return op.call(*(a.double() if a.is_floating_point() else a for a in arguments))


@pytest.mark.parametrize("num_nodes, per_sample", [(0, False), (1, False), (5, False), (5, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_kernel_error_is_at_most_twice_eager(name, dtype, shape, num_nodes, per_sample, isa, nan_filled, monkeypatch):
    if name == "leap_residuals" and shape == (3, 0):
        return  # outside its contract: there is no mean over nothing
    op, arguments = OPS[name], OPS[name].arguments(shape, num_nodes, dtype, per_sample)
    for result, eager, truth in zip(
        op.call(*arguments), op.eager(*arguments), exact(op, arguments, monkeypatch), strict=True
    ):
        assert result.shape == truth.shape and result.isfinite().all()
        error, allowed = (result.double() - truth).abs(), 2 * (eager.double() - truth).abs()
        tiny = 1e-7 * truth.abs().max() if truth.numel() else 0  # eager may hit the truth by luck
        assert error.sum() <= allowed.sum() + tiny * truth.numel()
        assert not error.numel() or error.max() <= allowed.max() + tiny


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_agree_with_the_reference(dtype, cache_dtype, isa, monkeypatch):
    x, cache, (nodes, weights) = draw(3, 4097, dtype=dtype), draw(5, 3, 4097, seed=1).to(cache_dtype), rule(4, 3, True)
    scales = draw(5, 3, seed=2).abs()
    calls = {
        "update": lambda: quadrature_update(x, cache, nodes, weights, scales=scales),
        "multistep": lambda: torch.cat(cfg_multistep_step(x, x, -x, 4.5, -0.04, cache, nodes, weights)),
        "leaps": lambda: leap_residuals(x, -x, x / 2, cache, nodes, (weights, weights), scales=scales),
    }
    if cache_dtype.itemsize > 1:
        slots = torch.empty(3, 4097, dtype=torch.float32), torch.empty_like(x)
        calls["guided step"] = lambda: torch.cat(cfg_euler_step(x, cache[0], cache[1], 4.5, -0.04))
        calls["multistep"] = lambda: torch.cat(cfg_multistep_step(x, x, -x, 4.5, -0.04, cache, nodes, weights))
        calls["step into slots"] = lambda: cfg_euler_step(
            x, cache[0], None, 1.0, -0.04, velocity_out=slots[0], out=slots[1]
        )[0].clone()
        calls["seeds"] = lambda: bridge_cotangents(x, cache[0], weights, weights, dtype=cache_dtype)
    for call in calls.values():
        monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
        result = call()
        monkeypatch.setenv("FLOWBP_KERNELS", "reference")
        roundings = {dtype, cache_dtype} - {torch.float8_e4m3fn}  # a stored velocity may fall on either side of a tie
        eps = max(1e-6, *(torch.finfo(rounding).eps for rounding in roundings))
        torch.testing.assert_close(result.float(), call().float(), rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multistep_step_has_the_bits_of_two_passes(dtype, cache_dtype, per_sample, everywhere):
    """Without nodes of the Euler step, and else of the sum over the rows with its velocity behind them."""
    x, v_cond, v_uncond = draw(3, 1041), draw(3, 1041, dtype=dtype, seed=1), draw(3, 1041, dtype=dtype, seed=2)
    cache, (nodes, weights) = draw(5, 3, 1041, seed=3).to(cache_dtype), rule(3, 3, per_sample)
    last = torch.full_like(nodes[:1], 5), torch.full_like(weights[:1], -0.04)
    for negative, slot in product((None, v_uncond), (None, torch.empty(3, 1041), torch.empty(3, 1041, dtype=dtype))):
        step = x, v_cond, negative, 4.5, -0.04
        x_euler, v_euler = (part.clone() for part in cfg_euler_step(*step, velocity_out=slot))
        none = cfg_multistep_step(*step, cache, nodes[:0], weights[:0], velocity_out=slot)
        assert torch.equal(none[0], x_euler) and torch.equal(none[1], v_euler)
        x_next, v = cfg_multistep_step(*step, cache, nodes, weights, velocity_out=slot)
        rows = torch.cat([cache.float(), v_euler.float()[None]])
        two_passes = quadrature_update(x, rows, torch.cat([nodes, last[0]]), torch.cat([weights, last[1]]))
        assert torch.equal(x_next, two_passes) and torch.equal(v, v_euler)


def test_every_float8_value_is_read_exactly(isa):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    nothing = torch.zeros(1, 256)
    for summed in (
        quadrature_update(nothing, values[None, None], [0], [1.0]),
        cfg_multistep_step(nothing, nothing, None, 1.0, 0.5, values[None, None], [0], [1.0])[0],
    ):
        assert torch.equal(summed[0].nan_to_num(), values.float().nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_kept(dtype, isa):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    kept = quadrature_update(values, values[None], [0], [0.0])
    assert torch.equal(kept.isnan(), values.isnan())
    assert torch.equal(kept.nan_to_num(nan=1.0), values.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_whose_bits_are_all_cut_off_stays_nan(dtype, isa):
    """Without its lowest bits it would be infinite."""
    values = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32).repeat(1, 35)
    velocity = torch.empty_like(values, dtype=dtype)
    cfg_euler_step(values, values, None, 1.0, 0.0, velocity_out=velocity)
    assert values.isnan().all() and velocity.isnan().all()


def test_float16_is_rounded_to_nearest_and_ties_to_even(isa):
    """Halfway between any two neighbours, just below and above, past the largest, and among float32's subnormals."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 2**16  # where the next one after 65504 would be: halfway to it, infinity begins
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), halves])
    values = np.concatenate([values, [1e9, np.inf, 1e-40]], dtype=np.float32)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(np.stack([values, -values]).astype(np.float16))
    velocities = torch.from_numpy(np.stack([values, -values]))[None]
    assert torch.equal(quadrature_update(torch.zeros_like(expected), velocities, [0], [1.0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_keeps_the_same_bits_of_nan(dtype, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    results = []
    for isa in ISAS:
        monkeypatch.setenv("FLOWBP_ISA", isa)
        wide = torch.empty_like(values, dtype=torch.float32)
        cfg_euler_step(values, values, None, 1.0, 0.0, velocity_out=wide)
        narrow = quadrature_update(values, values[None], [0], [0.0])
        results.append((wide.view(torch.int32), narrow.view(torch.int16)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif(len(ISAS) < 3, reason=f"this processor has {ISAS} only")
@pytest.mark.parametrize("name", OPS)
def test_instruction_sets_with_fused_multiply_add_agree_bit_for_bit(name, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    arguments = OPS[name].arguments((3, 4097), 5, torch.float32, True)
    results = []
    for isa in ("avx512", "avx2"):
        monkeypatch.setenv("FLOWBP_ISA", isa)
        results.append(OPS[name].call(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The rows that are read side by side, fewer and more.
@pytest.mark.parametrize("num_nodes, per_sample", [(0, False), (8, True), (25, False), (25, True)])
@pytest.mark.parametrize("size", [41, 2**15 + 299])  # less and more than a tile
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_how_a_cache_is_read_changes_no_bit(cache_dtype, size, num_nodes, per_sample, isa, monkeypatch):
    """Few rows side by side or all: the bits are those of one order, and the values are right."""
    few, all_, truth = (
        sums(cache_dtype, size, num_nodes, per_sample, rows, monkeypatch) for rows in ("few", "all", "reference")
    )
    assert all(map(torch.equal, few, all_))
    torch.testing.assert_close(few, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ["few", "all"])
def test_the_number_of_threads_changes_no_bit(rows, isa, monkeypatch):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(sums(torch.bfloat16, 2**15 + 299, 25, True, rows, monkeypatch))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def sums(cache_dtype, size, num_nodes, per_sample, rows, monkeypatch):
    """Both ops that sum the rows of a cache, by FLOWBP_ROWS or the reference, of rows of the first leap, of the second
    and of both.
    """
    x, y, z = (draw(2, size, seed=seed) for seed in range(3))
    cache, scales = draw(NUM_CACHED, 2, size, seed=3).to(cache_dtype), draw(NUM_CACHED, 2, seed=4).abs()
    nodes, first = rule(num_nodes, 2, per_sample)
    second = first.flip(0)
    first[: num_nodes // 3], second[num_nodes // 2 :] = 0, 0
    landings = torch.empty(2, 2, size)
    with monkeypatch.context() as patch:
        patch.setenv("FLOWBP_KERNELS", "reference" if rows == "reference" else "cpu")
        patch.setenv("FLOWBP_ROWS", rows)
        gaps = leap_residuals(x, y, z, cache, nodes, (first, second), scales=scales, predictions_out=landings)
        return quadrature_update(x, cache, nodes, first, scales=scales), gaps, landings


def test_the_first_large_calls_of_a_process_agree_whichever_measures(new_process, monkeypatch):
    """Several threads at once are the first to read much of a cache: one of them measures how, and all compute the
    same.
    """
    script = """
import threading, torch
from flowbp_kernels import backend, quadrature_update
torch.set_num_threads(1)
x, cache, results = torch.ones(1, 2**19), torch.ones(16, 1, 2**19, dtype=torch.bfloat16), []
update = lambda: results.append(quadrature_update(x, cache, range(16), [0.5] * 16))
calls = [threading.Thread(target=update) for _ in range(4)]
for call in calls: call.start()
for call in calls: call.join()
assert len(results) == 4 and all((result == 9).all() for result in results)
assert backend.rows() in ("few", "all") and backend.rows() == backend.rows()
"""
    monkeypatch.delenv("FLOWBP_ROWS", raising=False)
    new_process(script, FLOWBP_KERNELS="cpu")


def test_what_requires_grad_may_be_written_from_where_none_is_recorded():
    x, cache, out = draw(2, 41).requires_grad_(), draw(1, 2, 41, seed=1), torch.empty(2, 41)
    with pytest.raises(ValueError, match="writing into out records no gradient"):
        quadrature_update(x, cache, [0], [1.0], out=out)
    with torch.no_grad():
        assert torch.equal(quadrature_update(x, cache, [0], [1.0], out=out), x + cache[0])


@pytest.mark.parametrize("choice", ["cpu", "reference"])
def test_zero_coefficients_cut(choice, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    x, cache = draw(2, 41), draw(3, 2, 41, seed=1)
    cache[1] = torch.nan
    assert leap_residuals(x, x, x, cache, [0, 1, 2], ([0.5, 0.0, 0.0], [0.0, 0.0, 1.0])).isfinite().all()
    scales = torch.tensor([[1.0, 1.0], [torch.nan, torch.nan], [1.0, 1.0]])
    assert quadrature_update(x, cache, [0, 1, 2], [0.5, 0.0, 1.0], scales=scales).isfinite().all()
    assert cfg_multistep_step(x, x, None, 1.0, -0.1, cache, [0, 1, 2], [0.5, 0.0, 1.0])[0].isfinite().all()
    mixed = leap_residuals(x, x, x, cache, [0, 1], ([0.5, 0.0], [0.0, 1.0]))
    assert mixed[0].isfinite().all() and mixed[1].isnan().all()
    seeds = bridge_cotangents(x, cache[1], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    assert torch.equal(seeds[0], x) and not seeds[1].any() and seeds[2].isnan().all()
    assert not bridge_cotangents(cache[1], x, [0.0], [1.0]).any()


def test_a_residual_takes_every_chunk_of_a_large_sample(isa):
    """One more than the 256 threads that add chunks up."""
    start, target, end = (draw(1, 257 * 2048 + 5, seed=seed) for seed in range(3))
    found = leap_residuals(start, target, end, start[None], [0], ([0.0], [0.0]))
    expected = torch.stack([(start - target).abs().mean(1), (target - end).abs().mean(1)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_nodes", [1, 9])  # a launch takes 128 samples, or 256 nodes of fewer
@pytest.mark.parametrize("batch", [1, 129, 300])
def test_a_batch_of_rules_may_exceed_one_launch(batch, num_nodes, isa):
    x, cache, (nodes, weights) = draw(batch, 7), draw(NUM_CACHED, batch, 7, seed=1), rule(num_nodes, batch, True)
    v = draw(batch, 7, seed=2)
    together, step = quadrature_update(x, cache, nodes, weights), (v, -v, 4.5, -0.04)
    stepped = cfg_multistep_step(x, *step, cache, nodes, weights)[0]
    for b in {0, batch // 2, batch - 1}:
        one = slice(b, b + 1)
        alone = cache[:, one].contiguous(), nodes[:, b], weights[:, b]
        assert torch.equal(together[one], quadrature_update(x[one], *alone))
        assert torch.equal(stepped[one], cfg_multistep_step(x[one], v[one], -v[one], *step[2:], *alone)[0])


def test_more_than_2_to_the_31_elements_are_addressed(isa):
    """A cache of 2^32 float8 zeros that no memory backs, but for its last page."""
    if isa == "baseline":
        return
    size = 2**20
    cache = torch.from_numpy(np.zeros((2**12, 1, size), dtype=np.uint8))
    cache[-1, 0, -1] = 0x38  # 1.0
    nothing, row = torch.zeros(1, size), (cache.view(torch.float8_e4m3fn), [2**12 - 1], [2.0])
    for result in (quadrature_update(nothing, *row), cfg_multistep_step(nothing, nothing, None, 1.0, 0.5, *row)[0]):
        assert result[0, -1] == 2 and result.sum() == 2


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
    num_nodes=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
    per_sample=st.booleans(),
    strided=st.booleans(),
    name=st.sampled_from(list(OPS)),
)
@settings(max_examples=80, deadline=None, database=None)
def test_every_plan_stride_and_dtype_is_within_rounding_of_float64(shape, num_nodes, dtype, per_sample, strided, name):
    arguments = OPS[name].arguments(shape, num_nodes, dtype, per_sample)
    if strided:
        arguments = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in arguments]
    results = OPS[name].call(*arguments)
    for result, truth in zip(
        results, OPS[name].call(*(a.double() if a.is_floating_point() else a for a in arguments)), strict=True
    ):
        assert result.shape == truth.shape
        torch.testing.assert_close(
            result.double(), truth, rtol=2 * torch.finfo(result.dtype).eps, atol=max(2e-5, torch.finfo(dtype).eps)
        )


# -- registration ------------------------------------------------------------------------------------------------------


def operator_calls():
    x, y, z, cache = (
        t.requires_grad_() for t in (draw(3, 41), draw(3, 41, seed=1), draw(3, 41, seed=2), draw(5, 3, 41, seed=3))
    )
    nodes, weights = rule(4, 3, True)
    weights, scales, seeds = weights.double(), draw(5, 3).abs(), torch.empty(4, 3, 41)
    x0, y0, z0, cache0 = (t.detach() for t in (x, y, z, cache))
    step = torch.tensor([4.5, -0.1], dtype=torch.float64)
    of_a_rule = {
        "quadrature_update": (x, cache, nodes, weights, scales),
        "quadrature_update_out": (x0, cache0, nodes, weights, None, torch.empty_like(x0)),
        "leap_residuals": (x0, y0, z0, cache0, nodes, weights, weights, None),
        "leap_residuals_out": (x0, y0, z0, cache0, nodes, weights, weights, scales, torch.empty(2, 3, 41)),
        "cfg_multistep_step": (x, y, z, step, cache, nodes, weights),
        "cfg_multistep_step_out": (
            x0,
            y0,
            None,
            step,
            cache0,
            nodes,
            weights,
            torch.empty_like(x0),
            torch.empty_like(x0),
        ),
        "bridge_cotangents": (x, y, weights, weights, torch.bfloat16),
        "bridge_cotangents_out": (x0, y0, weights, weights, seeds),
    }
    forms = {name + form: arguments for name, arguments in of_a_rule.items() for form in ("", "_on_device")}
    return forms | {"straight_through": (x0, y, 0.5)}


@pytest.mark.parametrize("choice", ["cpu", "reference"])
@pytest.mark.parametrize("name", operator_calls())
def test_the_operator_is_registered_correctly(name, choice, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    library.opcheck(getattr(torch.ops.flowbp_kernels, name).default, operator_calls()[name])


@pytest.mark.parametrize("choice", ["cpu", "reference"])
@pytest.mark.parametrize("guided, rows", [(False, True), (True, False)])
def test_the_operator_takes_a_step_without_guidance_and_one_without_rows(guided, rows, choice, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    x, y, z, step, *cached = operator_calls()["cfg_multistep_step"]
    arguments = x, y, z if guided else None, step, *(cached if rows else [None] * 3)
    library.opcheck(torch.ops.flowbp_kernels.cfg_multistep_step.default, arguments)


# Checked in test_modulation.py, test_qk_norm.py, test_activations.py and test_lora_linear.py.
OF_A_NETWORK = {
    name + suffix for name in ("modulation", "qk_norm", "swiglu", "gelu", "lora_linear") for suffix in ("", "_backward")
}


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flowbp_kernels::")
    }
    assert registered == set(operator_calls()) | OF_A_NETWORK


def test_what_a_cuda_graph_would_freeze_is_kept_out_of_it():
    """A rule that travels by value is part of a captured launch: every later plan would run with the first one's
    numbers.
    """
    for name in operator_calls().keys() - {"straight_through"}:
        tags = getattr(torch.ops.flowbp_kernels, name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == (not name.endswith("_on_device")), name


def test_a_step_with_slots_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")

    def two_steps(x, v_cond, v_uncond, velocities, latents):
        for i in range(2):
            earlier = velocities, [0][:i], [0.02][:i]
            slots = {"velocity_out": velocities[i], "out": latents[i]}
            x, v = cfg_multistep_step(x, v_cond, v_uncond, 4.5, -0.04, *earlier, **slots)
        return x, leap_residuals(latents[0], x, v, velocities, [0, 1], ([0.5, 0.0], [0.0, -1.0]))

    arguments = [draw(3, 41, seed=seed) for seed in range(3)]
    caches = [[torch.empty(2, 3, 41) for _ in range(2)] for _ in range(2)]
    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(compiled(*arguments, *caches[0]), two_steps(*arguments, *caches[1]), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_a_call_has_the_bits_of_its_operator(name, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    arguments = OPS[name].arguments((3, 41), 4, torch.float32, True)
    direct = OPS[name].call(*arguments)
    monkeypatch.setattr(backend, "needs_operator", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(direct, OPS[name].call(*arguments), strict=True))


def test_autograd_notices_that_a_saved_slot_was_overwritten():
    x, cache, slot = draw(3, 41), draw(1, 3, 41, seed=1), draw(3, 41, seed=2)
    product = torch.ones(3, 41, requires_grad=True) * slot
    quadrature_update(x, cache, [0], [1.0], out=slot)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_fake_tensors_pass_through_every_op():
    with FakeTensorMode():
        for name, op in OPS.items():
            fake = [
                torch.empty(3, 41)
                for _ in range(op.num_tensors - (name not in ("cfg_euler_step", "bridge_cotangents")))
            ]
            caches = [torch.empty(2, 3, 41)] * (op.num_tensors - len(fake))
            rules = {"quadrature_update": ([0, 1], [0.5, 1.0]), "leap_residuals": ([0, 1], [0.5, 0], [0, 1.0])}
            rules |= {"bridge_cotangents": ([0.5, 1.0], [0.1, 0]), "cfg_euler_step": (4.5, -0.1)}
            rules |= {"cfg_multistep_step": (4.5, -0.1, [0, 1], [0.5, 1.0])}
            assert all(isinstance(result, FakeTensor) for result in op.call(*fake, *caches, *rules[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seeds_past_the_caches_have_the_bits_of_seeds_in_them(dtype, isa):
    g, g_x = draw(2, 65552, dtype=dtype), draw(2, 65552, dtype=dtype, seed=1)
    weights, alphas = draw(17), draw(17, seed=1)
    together = bridge_cotangents(g, g_x, weights, alphas)
    assert together.nbytes > 2**22
    apart = [bridge_cotangents(g, g_x, weights[k : k + 1], alphas[k : k + 1]) for k in range(17)]
    assert apart[0].nbytes < 2**22 and torch.equal(together, torch.cat(apart))
