"""The CUDA kernels, unchanged, on the CPU: bit for bit the compiled CPU ops, and clean under two sanitizers."""

import importlib.util
import platform
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernels.cases import draw
from kernels.emulate import build

from flowbp_kernels import (
    backend,
    bridge_cotangents,
    cfg_euler_step,
    cfg_multistep_step,
    leap_residuals,
    quadrature_update,
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}  # Dtype in csrc/ops.h
SHAPES = [(3, 41), (1, 4097), (2, 2056)]  # the last in accesses of 16 bytes; of one chunk, of three and of two
GUIDANCE_AND_H = np.array([4.5, -0.04])
NO_ROWS = None, None, None

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="built with AVX2 and FMA"),
    pytest.mark.skipif(bool(build.missing()), reason=build.missing()),
    pytest.mark.skipif(bool(backend.unavailable("cpu")), reason=backend.unavailable("cpu")),
    pytest.mark.skipif(backend.isa() == "baseline", reason="the baseline of x86-64 has no fused multiply-add"),
]


@pytest.fixture(scope="module")
def emulated():
    spec = importlib.util.spec_from_file_location("emulated", build.module())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def against_the_compiled_ops(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")


def raw(tensor):
    """A tensor as the emulated kernels take it: its bytes, in place, and its dtype."""
    return tensor.view(torch.uint8).numpy(), DTYPES[tensor.dtype]


def unwritten(*shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def rule(num_nodes, columns):
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, num_nodes, columns, generator=generator)
    weights[0, -1] = weights[1, 0] = 0
    return torch.randint(5, (num_nodes, columns), generator=generator), weights


@pytest.fixture(params=[False, True], ids=["by value", "on the device"])
def on_device(request):
    """Whether the kernel reads the rule when it runs."""
    return request.param


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_a_cache_have_the_same_bits(emulated, shape, cache_dtype, on_device):
    batch, size = shape
    for dtype in (torch.float32, torch.bfloat16) if cache_dtype != torch.float16 else (torch.float16,):
        x_k, x_j, x_end = (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))
        cache, scales = draw(5, *shape, seed=3).to(cache_dtype), draw(5, batch, seed=4)
        for (nodes, weights), factors in ((rule(11, 1), None), (rule(3, batch), scales)):
            table = (nodes, *weights) if batch == 1 or nodes.shape[1] > 1 else (nodes[:, 0], *weights[:, :, 0])
            factor = None if factors is None else factors.numpy()
            out = unwritten(*shape, dtype=dtype)
            emulated.quadrature_update(
                raw(x_k),
                raw(cache),
                nodes.numpy(),
                weights[:1].contiguous().numpy(),
                factor,
                raw(out),
                5,
                batch,
                size,
                on_device,
            )
            assert same_bits(out, quadrature_update(x_k, cache, *table[:2], scales=factors))

            stepped, velocity = unwritten(*shape, dtype=dtype), unwritten(*shape, dtype=dtype)
            emulated.cfg_multistep_step(
                *map(raw, (x_k, x_j, x_end)), GUIDANCE_AND_H, raw(cache), nodes.numpy(),
                weights[:1].contiguous().numpy(), raw(velocity), raw(stepped), 5, batch, size, on_device,
            )  # fmt: skip
            x_next, v = cfg_multistep_step(x_k, x_j, x_end, 4.5, -0.04, cache, *table[:2])
            assert same_bits(stepped, x_next) and same_bits(velocity, v)

            landings, expected = (unwritten(2, *shape, dtype=torch.float32) for _ in range(2))
            partials, residuals = (
                torch.empty(2, batch, -(-size // emulated.chunk)),
                unwritten(2, batch, dtype=torch.float32),
            )
            emulated.leap_residuals(
                *map(raw, (x_k, x_j, x_end, cache)), nodes.numpy(), weights.numpy(), factor,
                raw(landings), partials.numpy(), residuals.numpy(), 5, batch, size, on_device,
            )  # fmt: skip
            result = leap_residuals(
                x_k, x_j, x_end, cache, table[0], table[1:], scales=factors, predictions_out=expected
            )
            assert same_bits(residuals, result) and same_bits(landings, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elementwise_ops_have_the_same_bits(emulated, shape, dtype, on_device):
    batch, size = shape
    x, y, z = draw(*shape), draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    for v_uncond, slot in ((z, None), (z, torch.float32), (None, torch.bfloat16)):
        out, velocity, mine = (
            unwritten(*shape, dtype=x.dtype),
            *(unwritten(*shape, dtype=slot or dtype) for _ in range(2)),
        )
        given = None if v_uncond is None else raw(z)
        sizes = 0, 1, x.numel(), on_device  # all elements are one sample's
        emulated.cfg_multistep_step(raw(x), raw(y), given, GUIDANCE_AND_H, *NO_ROWS, raw(mine), raw(out), *sizes)
        x_next, v = cfg_euler_step(x, y, v_uncond, 4.5, -0.04, velocity_out=velocity)
        assert same_bits(out, x_next) and same_bits(mine, v)

    _, weights = rule(4, batch)
    seeds = unwritten(4, *shape, dtype=dtype)
    emulated.bridge_cotangents(raw(x), raw(y), weights.numpy(), raw(seeds), batch, size, on_device)
    assert same_bits(seeds, bridge_cotangents(x, y, *weights, dtype=dtype))


def test_a_node_that_is_not_in_the_cache_shows_unless_its_weight_is_zero(emulated):
    """With its rule on the device: there is nobody whom the kernel could tell."""
    x, cache, landings = draw(2, 41), draw(3, 2, 41, seed=1), unwritten(2, 2, 41, dtype=torch.float32)
    nodes = np.array([[0, 0], [3, 2], [-1, 1], [2**40, 1]])
    weights = np.array([[[1.0, 1.0]] * 4, [[1.0, 1.0], *[[0.0, 0.0]] * 3]])
    partials, residuals = torch.empty(2, 2, 1), unwritten(2, 2, dtype=torch.float32)
    emulated.leap_residuals(
        raw(x),
        raw(x),
        raw(x),
        raw(cache),
        nodes,
        weights,
        None,
        raw(landings),
        partials.numpy(),
        residuals.numpy(),
        3,
        2,
        41,
        True,
    )
    assert landings[0, 0].isnan().all() and residuals[0].isnan().tolist() == [True, False]
    assert torch.equal(landings[0, 1], x[1] + cache[0, 1] + cache[2, 1] + cache[1, 1] + cache[1, 1])
    assert torch.equal(landings[1], x + cache[0])


def test_a_dtype_that_no_kernel_takes_ends_the_process(emulated):
    """A launch that returned in silence would leave its output unwritten."""
    script = (
        "import importlib.util, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('emulated', {emulated.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "byte = (np.zeros(1, np.uint8), 3), (np.zeros(4, np.uint8), 0)\n"
        "rows = None, None, None\n"
        "module.cfg_multistep_step(byte[0], byte[1], None, np.zeros(2), *rows, None, byte[1], 0, 1, 1, False)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT, ended.stderr


def shifted(tensor):
    """A copy, contiguous, that starts one element into its memory."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


def test_no_16_byte_access_where_a_tensor_does_not_start_on_16_bytes(emulated, on_device):
    """The emulated access aborts on a misaligned address, as a GPU would."""
    shape, (nodes, weights) = (2, 16), rule(4, 1)
    sizes = 5, *shape, on_device
    x, y, z, out, slot = (draw(*shape, seed=seed) for seed in range(5))
    cache, seeds, landings = draw(5, *shape, seed=5), draw(4, *shape), draw(2, *shape)
    weight, partials, residuals = (
        weights[:1].contiguous().numpy(),
        torch.empty(2, 2, 1).numpy(),
        torch.empty(2, 2).numpy(),
    )
    calls = {
        lambda x, cache, out: emulated.quadrature_update(x, cache, nodes.numpy(), weight, None, out, *sizes): (x,
        cache, out),
        lambda *t: emulated.leap_residuals(
            *t[:4], nodes.numpy(), weights.numpy(), None, t[4], partials, residuals, *sizes
        ): (x, y, z, cache, landings),
        lambda x, y, z, slot, out: emulated.cfg_multistep_step(
            x, y, z, GUIDANCE_AND_H, *NO_ROWS, slot, out, *sizes
        ): (x, y, z, slot, out),
        lambda x, y, z, cache, slot, out: emulated.cfg_multistep_step(
            x, y, z, GUIDANCE_AND_H, cache, nodes.numpy(), weight, slot, out, *sizes
        ): (x, y, z, cache, slot, out),
        lambda g, g_x, seeds: emulated.bridge_cotangents(g, g_x, weights.numpy(), seeds, *sizes[1:]): (x, y, seeds),
    }  # fmt: skip
    for call, tensors in calls.items():
        call(*map(raw, tensors))
        for moved in range(len(tensors)):
            mine = [shifted(t) if i == moved else t.clone() for i, t in enumerate(tensors)]
            call(*map(raw, mine))
            assert all(map(torch.equal, mine, tensors))


def run(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def compile_emulated():
    """The builds of all kernels and sanitize.cpp; each returns a program's path."""
    return build


@pytest.mark.parametrize("sanitizer, planted, finding", [
    ("address", "PLANT_OUT_OF_BOUNDS", "heap-buffer-overflow"),
    ("thread", "PLANT_NO_SYNCTHREADS", "data race"),
])  # fmt: skip
def test_the_sanitizer_finds_a_planted_bug_and_nothing_else(sanitizer, planted, finding, compile_emulated, monkeypatch):
    clean = run(compile_emulated.program(sanitizer))
    assert clean.returncode == 0 and clean.stdout == "equal\n", clean.stdout + clean.stderr
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")  # as AddressSanitizer does
    broken = run(compile_emulated.program(sanitizer, planted))
    assert broken.returncode != 0 and finding in broken.stderr


def test_the_baseline_of_aarch64_has_the_bits_of_cuda(compile_emulated):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    crossed = run([emulator, compile_emulated.program_for(compiler)])
    assert crossed.returncode == 0 and crossed.stdout == "equal\n", crossed.stdout + crossed.stderr
