"""The Triton kernels compiled for GPUs that are not here: what ptxas makes of them on sm_80, sm_90 and sm_100.

A latent's size and its pointers are multiples of 16, as they are in training; Triton finds that out at a launch, here it is said.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install flowbp[triton])", exc_type=ImportError)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flowbp_kernels._triton import bridge_cotangents, cfg_euler_step, leap_residuals, quadrature_update  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
RULE = ("fp32",) * 8  # eight nodes, or their weights
PLACE = {"batch": "i32", "size": "i32"}


def update(cache):
    return {"x": "*bf16", "velocities": cache, "out": "*bf16", "nodes": RULE, "weights": RULE, **PLACE}


# kernel, its arguments (those not named are None), BLOCK, registers a thread at most, 16-byte loads and stores of global memory.
# 64 registers leave 8 programs a multiprocessor, 168 leave 3, each of which has twice the bytes in flight.
CASES = {
    "quadrature_update, bf16": (quadrature_update.kernel, update("*bf16"), 1024, 64, (9, 1)),
    "quadrature_update, fp32": (quadrature_update.kernel, update("*fp32"), 1024, 64, (17, 1)),
    "quadrature_update, fp8": (quadrature_update.kernel, update("*u8") | {"scales": "*fp32"}, 2048, 168, (10, 2)),
    "cfg_euler_step": (
        cfg_euler_step.kernel,
        dict.fromkeys(("x", "v_cond", "v_uncond", "velocity", "out"), "*bf16") | {"guidance": "fp32", "h": "fp32", "size": "i32"},
        1024,
        64,
        (3, 2),
    ),
    "bridge_cotangents": (
        bridge_cotangents.kernel,
        {"g": "*fp32", "g_x": "*bf16", "out": "*bf16", "weights": RULE, "alphas": RULE, **PLACE},
        1024,
        64,
        (3, 8),
    ),
    "leap_residuals": (
        leap_residuals.kernel,
        dict.fromkeys(("x_k", "x_j", "x_end", "velocities", "at_j", "at_end"), "*bf16")
        | {"parts_j": "*fp32", "parts_end": "*fp32"}
        | dict.fromkeys(("nodes_j", "weights_j", "nodes_end", "weights_end"), RULE[:4])
        | PLACE,
        1024,
        64,
        (11, 2),
    ),
}


def compile_for(arch, kernel, arguments, block):
    """(PTX, SASS, resource usage) of a kernel with 4 warps, as a launch compiles it."""
    index = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    constants = {index[name]: block if name == "BLOCK" else None for name in index if name not in arguments}
    signature = {name: arguments.get(name, "constexpr") for name in index}
    aligned = [name for name, kind in arguments.items() if name == "size" or kind[0] == "*"]
    attributes = {index[name]: [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    return compiled.asm["ptx"], compiled.asm["cubin"]


def dump(option, cubin_path):
    return subprocess.run([CUOBJDUMP, option, cubin_path], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_kernels_keep_to_their_registers_and_move_16_bytes_at_a_time(case, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, block, ceiling, (loads, stores) = CASES[case]
    ptx, cubin = compile_for(arch, kernel, arguments, block)
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    usage, sass = dump("-res-usage", tmp_path / "kernel.cubin"), dump("-sass", tmp_path / "kernel.cubin")
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    assert registers <= ceiling
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", sass), "registers spill"
    assert len(re.findall(r"LDG\.\S*128", sass)) >= loads
    assert len(re.findall(r"STG\.\S*128", sass)) >= stores
    assert "cvt.rn.bf16" in ptx, "results are rounded to nearest (the interpreter cuts them, so only this test sees it)"
