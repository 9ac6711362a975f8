"""On a GPU: the CUDA ops give the CPU's bits, Triton's agree within rounding, and every op can be captured in a CUDA graph."""

import pytest
import torch
from kernels.cases import DTYPES, OPS, SHAPES, draw, rule

from flowbp_kernels import backend, bridge_cotangents, cfg_euler_step, leap_residuals, quadrature_update

pytestmark = pytest.mark.gpu
SIZES = [shape for shape in SHAPES if 0 not in shape] + [(2, 16, 64, 64), (1, 16, 21, 90, 160)]


@pytest.fixture(autouse=True)
def with_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


def run(monkeypatch, name, choice, arguments):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    return [result.cpu() for result in OPS[name].call(*arguments)]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_cuda_gives_the_bits_of_the_cpu(name, dtype, shape, per_sample, monkeypatch):
    assert not backend.unavailable("cuda"), backend.unavailable("cuda")
    arguments = OPS[name].arguments(shape, 5, dtype, per_sample)
    results = run(monkeypatch, name, "cuda", OPS[name].to("cuda", arguments)), run(monkeypatch, name, "cpu", arguments)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_triton_agrees_with_the_reference(name, dtype, shape, monkeypatch):
    if backend.unavailable("triton"):
        pytest.skip(backend.unavailable("triton"))
    arguments = OPS[name].to("cuda", OPS[name].arguments(shape, 5, dtype, True))
    results = run(monkeypatch, name, "triton", arguments), run(monkeypatch, name, "reference", arguments)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2 * torch.finfo(a.dtype).eps, atol=2e-5)


def test_float8_caches_give_the_bits_of_the_cpu(monkeypatch):
    x, cache, (nodes, weights) = draw(3, 4096), draw(5, 3, 4096, seed=1).to(torch.float8_e4m3fn), rule(4, 3, True)
    scales = draw(5, 3, seed=2).abs()
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    mine = quadrature_update(x.cuda(), cache.cuda(), nodes, weights, scales=scales.cuda())
    assert torch.equal(mine.cpu(), quadrature_update(x, cache, nodes, weights, scales=scales))


@pytest.mark.parametrize("choice", ["cuda", "triton"])
def test_every_op_can_be_captured(choice, monkeypatch):
    if choice == "triton" and backend.unavailable("triton"):
        pytest.skip(backend.unavailable("triton"))
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
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
