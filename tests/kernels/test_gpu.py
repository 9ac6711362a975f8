"""On a GPU: the CUDA ops give the CPU's bits, so do Triton's but for means, and every op can be captured in a CUDA
graph.
"""

import pytest
import torch
from kernels.cases import DTYPES, OPS, SHAPES, draw, rule

from flowbp_kernels import (
    GraphedForward,
    backend,
    bridge_cotangents,
    cfg_euler_step,
    in_tf32,
    leap_residuals,
    quadrature_update,
)
from flowbp_kernels.attention import prefers_cudnn, settle_order, try_attention

SIZES = [shape for shape in SHAPES if 0 not in shape] + [(2, 16, 64, 64), (1, 16, 21, 90, 160)]


@pytest.fixture(autouse=True)
def needs_a_gpu(gpu):
    """Every test of this file does."""


def run(monkeypatch, name, choice, arguments):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    return [result.cpu() for result in OPS[name].call(*arguments)]


@pytest.fixture(params=["cuda", "triton"])
def choice(request, monkeypatch):
    if request.param == "triton" and backend.unavailable("triton"):
        pytest.skip(backend.unavailable("triton"))
    monkeypatch.setenv("FLOWBP_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("rule_too", [False, True], ids=["rule by value", "rule on the device"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_the_bits_are_those_of_the_cpu(name, dtype, shape, per_sample, rule_too, choice, monkeypatch):
    """But for Triton's residuals, means which it sums in another order."""
    arguments = OPS[name].arguments(shape, 5, dtype, per_sample)
    mine = run(monkeypatch, name, choice, OPS[name].to("cuda", arguments, rule_too))
    for i, (a, b) in enumerate(zip(mine, run(monkeypatch, name, "cpu", arguments), strict=True)):
        if choice == "triton" and name == "leap_residuals" and i == 0:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        else:
            assert torch.equal(a, b)


def test_one_captured_graph_serves_every_plan(choice):
    """Plans of one size: one of fewer nodes is filled up with weights of zero, whose nodes are not read."""
    arguments = {
        name: op.to("cuda", op.arguments((2, 4096), 5, torch.bfloat16, True), rule_too=True) for name, op in OPS.items()
    }

    def everything():
        return [result for name, op in OPS.items() for result in op.call(*arguments[name])]

    for _ in range(3):
        everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    nodes, weights = (part.cuda() for part in rule(5, 2, True, seed=20))
    nodes[3:], weights[3:] = 2**30, 0
    for name, *parts in (
        ("quadrature_update", nodes, weights),
        ("leap_residuals", nodes, weights, weights.flip(1)),
        ("cfg_euler_step", torch.tensor(2.0), torch.tensor(-0.3)),
        ("cfg_multistep_step", torch.tensor(2.0), torch.tensor(-0.3), nodes, weights),
        ("bridge_cotangents", weights, weights),
    ):
        for table, other in zip(arguments[name][OPS[name].num_tensors :], parts, strict=True):
            table.copy_(other)
    graph.replay()
    expected = everything()
    assert all(result.isfinite().all() for result in expected) and all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("on_device", [False, True])
def test_no_call_waits_for_the_device(on_device, choice):
    tensors = {
        name: op.to("cuda", op.arguments((2, 4096), 5, torch.bfloat16, True), on_device) for name, op in OPS.items()
    }
    for mode in ("default", "error"):  # the first call loads and compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for name, op in OPS.items():
                op.call(*tensors[name])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", [4096, 4097])
def test_float8_caches_give_the_bits_of_the_cpu(size, monkeypatch):
    x, cache, (nodes, weights) = draw(3, size), draw(5, 3, size, seed=1).to(torch.float8_e4m3fn), rule(4, 3, True)
    scales = draw(5, 3, seed=2).abs()

    def ops(device):
        monkeypatch.setenv("FLOWBP_KERNELS", device)
        here, velocities, factors = x.to(device), cache.to(device), scales.to(device)
        end = quadrature_update(here, velocities, nodes, weights, scales=factors)
        return end.cpu(), leap_residuals(here, end, -here, velocities, nodes, (weights, weights), scales=factors).cpu()

    assert all(torch.equal(a, b) for a, b in zip(ops("cuda"), ops("cpu"), strict=True))


def shifted(tensor):
    """A copy, contiguous, that starts one element into its memory: no 16-byte load fits it."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_where_a_tensor_starts_in_its_memory_changes_nothing(name, dtype, choice):
    arguments = OPS[name].to("cuda", OPS[name].arguments((2, 4096), 5, dtype, False))
    for moved in range(OPS[name].num_tensors):
        results = OPS[name].call(*(shifted(a) if i == moved else a for i, a in enumerate(arguments)))
        rtol = 0 if choice == "cuda" else 1e-6  # Triton sums in another order
        for a, b in zip(results, OPS[name].call(*arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0)


def test_a_latent_may_be_written_over(choice):
    x, cache = draw(2, 4097).cuda(), draw(5, 2, 4097, seed=1).cuda()
    expected = quadrature_update(x, cache, [0, 3], [0.5, -0.25]), *cfg_euler_step(x, cache[0], cache[1], 4.5, -0.04)
    mine = x.clone()
    assert quadrature_update(mine, cache, [0, 3], [0.5, -0.25], out=mine) is mine and torch.equal(mine, expected[0])
    cfg_euler_step(mine.copy_(x), cache[0], cache[1], 4.5, -0.04, velocity_out=cache[0], out=mine)
    assert torch.equal(mine, expected[1]) and torch.equal(cache[0], expected[2])


def test_indices_go_past_32_bits(choice):
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("less than 25 GB of GPU memory are free")
    rows, size = 9, 2**28 + 8
    cache = torch.full((rows, 1, size), 2.0, dtype=torch.bfloat16, device="cuda")
    x = torch.ones_like(cache[0])
    assert (quadrature_update(x, cache, [rows - 1], [0.5]) == 2).all()
    gaps = leap_residuals(x, x, x, cache, [rows - 1], ([0.5], [0.25]))
    torch.testing.assert_close(gaps.cpu(), torch.tensor([[1.0], [0.5]]))
    assert (bridge_cotangents(x, x, [1.0] * rows, [3.0] * rows, out=cache) == 4).all()
    everything = cache.view(1, -1)
    assert (quadrature_update(everything, cache[None].view(1, 1, -1), [0], [-0.5]) == 2).all()
    cfg_euler_step(
        everything, everything, everything, 4.5, -0.5, velocity_out=torch.empty_like(everything), out=everything
    )
    assert (everything == 2).all()


def test_the_tensors_choose_the_device(choice):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, cache = draw(2, 4096), draw(5, 2, 4096, seed=1)
    with torch.cuda.device(0):
        assert torch.equal(quadrature_update(x.to("cuda:1"), cache.to("cuda:1"), [0], [0.5]).cpu(), x + 0.5 * cache[0])


def test_every_op_can_be_captured(choice):
    x, cache = draw(2, 4096).cuda(), draw(5, 2, 4096, seed=1).cuda()
    slots = torch.empty_like(cache)

    def everything():
        x_next, v = cfg_euler_step(x, cache[0], cache[1], 4.5, -0.04, velocity_out=slots[0], out=slots[1])
        summed = quadrature_update(x_next, cache, [0, 3], [0.5, -0.25])
        return (
            summed,
            leap_residuals(x, x_next, v, cache, [0, 3], ([0.5, 0.0], [0.0, 1.0])),
            bridge_cotangents(x, v, [1.0, 0.5], [0.3, 0.0]),
        )

    for _ in range(3):
        expected = everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_current_stream_is_used(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cuda")
    x, cache = draw(1, 2**20).cuda(), draw(1, 1, 2**20, seed=1).cuda()
    expected = quadrature_update(x, cache, [0], [1.0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # a launch on another stream would read zeros
        result = quadrature_update(late, cache, [0], [1.0])
    stream.synchronize()
    assert torch.equal(result, expected)


@torch.no_grad()
def test_a_graphed_forward_has_the_bits_of_its_function_and_sees_weights_that_change_in_place():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda().bfloat16()
    forward = GraphedForward(lambda x, given: network(x) * given["scale"])
    for batch in (1, 2, 1):
        for seed in (0, 1):
            given = draw(batch, 64, seed=seed).cuda().bfloat16(), {"scale": draw(batch, 1, seed=9).cuda().bfloat16()}
            assert torch.equal(forward(*given), forward.__wrapped__(*given))
        network[0].weight.mul_(1.5)
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph"):
        GraphedForward(lambda x: x * x.sum().item())(torch.ones(2, device="cuda"))


def test_a_product_takes_tf32_where_it_is_allowed_and_nowhere_else():
    a, b = draw(512, 512).cuda().requires_grad_(), draw(512, 512, seed=1).cuda()
    exact, g = a.detach().double() @ b.double(), (torch.ones(512, 512, device="cuda").double() @ b.double().T)
    error = {"plain": (a @ b - exact).abs().max(), "tf32": ((y := in_tf32(lambda a: a @ b, a)) - exact).abs().max()}
    assert error["tf32"] > 10 * error["plain"]
    (found,) = torch.autograd.grad(y.sum(), a)
    assert (found - g).abs().max() > 10 * ((torch.ones_like(y) @ b.T) - g).abs().max()


def test_cudnns_attention_has_a_gradient_where_it_is_preferred():
    if not prefers_cudnn():
        pytest.skip("this GPU is not of capability 9.0, or its cuDNN is too old")
    settle_order()
    try_attention("_native_cudnn", "cuda", torch.bfloat16, gradient=True)
