"""The Triton kernels compiled for GPUs that are not here: what ptxas makes of them on sm_80, sm_90 and sm_100.

A latent's size and its pointers are multiples of 16, as they are in training; Triton finds that out at a launch, here
it is said.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip(
    "triton", reason="Triton is not installed (pip install flowbp[triton])", exc_type=ImportError
)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flowbp_kernels._triton import (  # noqa: E402
    CARRIED,
    OPTIONS,
    activations,
    bridge_cotangents,
    cfg_multistep_step,
    leap_residuals,
    modulation,
    qk_norm,
    quadrature_update,
    write,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BATCH = {"count": "i32", "size": "i32"}
HUGE = {"count": "i32", "size": "i64"}  # samples of 2**31 elements and more
CACHE = {"num_nodes": "i32", "num_cached": "i32"}


def table(nodes_or_weights, columns, kind="*fp64"):
    return {nodes_or_weights: kind, columns: "i32"}


RULE = table("nodes", "node_columns", "*i64") | table("weights", "weight_columns") | CACHE
LEAPS = (
    table("nodes", "node_columns", "*i64")
    | table("weights_j", "columns_j")
    | table("weights_end", "columns_end")
    | CACHE
)
SEEDS = table("weights", "weight_columns") | table("alphas", "alpha_columns") | {"num_nodes": "i32"}


def update(cache, batch=BATCH):
    return {"x": "*bf16", "velocities": cache, "out": "*bf16", **RULE, **batch}


def leaps(cache, batch=BATCH):
    bfloat16 = dict.fromkeys(("x_k", "x_j", "x_end", "at_j", "at_end"), "*bf16")
    return bfloat16 | {"velocities": cache, "parts_j": "*fp32", "parts_end": "*fp32", **LEAPS, **batch}


def seeds(batch=BATCH):
    return {"g": "*fp32", "g_x": "*bf16", "out": "*bf16", **SEEDS, **batch}


def step(batch=BATCH, **others):
    """Of no rows, an Euler step, unless `others` has velocities."""
    tensors = dict.fromkeys(("x", "v_cond", "v_uncond", "velocity", "out"), "*bf16")
    rule = RULE if "velocities" in others else dict.fromkeys(("node_columns", "weight_columns", *CACHE), "i32")
    return tensors | {"guidance": "fp32", "h": "fp32"} | rule | batch | others


SCALES = {"scales": "*fp32"}

# kernel, its arguments (those not named are None), BLOCK, registers a thread at most, 16-byte loads and stores of
# global memory. A loop takes 8 rows at a time, however many a rule has: what is compiled here runs 1 node, 25, 50 and
# 256. 64 registers leave 8 programs a multiprocessor, 80 leave 6, 128 leave 4.
CASES = {
    "quadrature_update, bf16": (quadrature_update.kernel, update("*bf16"), 1024, 64, (9, 1)),
    "quadrature_update, bf16, scaled": (quadrature_update.kernel, update("*bf16") | SCALES, 1024, 64, (9, 1)),
    "quadrature_update, fp32": (quadrature_update.kernel, update("*fp32"), 1024, 80, (17, 1)),
    "quadrature_update, fp8": (quadrature_update.kernel, update("*u8") | SCALES, 2048, 80, (10, 2)),
    "quadrature_update, fp8, 64-bit size": (quadrature_update.kernel, update("*u8", HUGE) | SCALES, 2048, 80, (10, 2)),
    "Euler step, by value": (cfg_multistep_step.kernel, step(), 1024, 64, (3, 2)),
    "Euler step, on the device": (cfg_multistep_step.kernel, step(on_device="*fp64"), 1024, 64, (3, 2)),
    "Euler step, 64-bit size": (cfg_multistep_step.kernel, step(HUGE), 1024, 64, (3, 2)),
    "multistep, bf16": (cfg_multistep_step.kernel, step(velocities="*bf16"), 1024, 80, (11, 2)),
    "multistep, fp32, on the device": (
        cfg_multistep_step.kernel,
        step(velocities="*fp32", on_device="*fp64"),
        1024,
        96,
        (19, 2),
    ),
    "multistep, fp8": (cfg_multistep_step.kernel, step(velocities="*u8"), 2048, 128, (14, 4)),
    "multistep, 64-bit size": (cfg_multistep_step.kernel, step(HUGE, velocities="*bf16"), 1024, 80, (11, 2)),
    "bridge_cotangents": (bridge_cotangents.kernel, seeds(), 1024, 64, (3, 8)),
    "bridge_cotangents, 64-bit size": (bridge_cotangents.kernel, seeds(HUGE), 1024, 64, (3, 8)),
    "leap_residuals": (leap_residuals.kernel, leaps("*bf16"), 1024, 80, (19, 2)),
    "leap_residuals, fp8": (leap_residuals.kernel, leaps("*u8") | SCALES, 2048, 128, (22, 4)),
    "leap_residuals, 64-bit size": (leap_residuals.kernel, leaps("*bf16", HUGE), 1024, 80, (19, 2)),
    "write": (
        write,
        {"words": "*i64", "numbers": ("fp32",) * CARRIED, "count": "i32", "integers": "i32"},
        None,
        64,
        (0, 0),
    ),
}


ALIGNED = {"size", "width", "before", "g_row", "gate_row", "value_row", "prefix_row", "x_row"}
STRIDES = "i32", "i32", "i32"


def compile_for(arch, kernel, arguments, constants, options=OPTIONS):
    """(PTX, machine code) of a kernel, as a launch compiles it. A tuple of arguments travels as one. Pointers and
    strides are multiples of 16.
    """
    index = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    signature = {name: arguments.get(name, "constexpr") for name in index}
    aligned = [index[name] for name, kind in arguments.items() if name in ALIGNED or kind[0] == "*"]
    tuples = {name: kind for name, kind in arguments.items() if isinstance(kind, tuple) and name != "numbers"}
    aligned += [(*index[name], part) for name, kind in tuples.items() for part in range(len(kind))]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    constants = {index[name]: constants.get(name) for name in index if name not in arguments}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.asm["ptx"], compiled.asm["cubin"]


def dump(option, cubin_path):
    return subprocess.run([CUOBJDUMP, option, cubin_path], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def triton_cache(tmp_path, monkeypatch):
    """An empty cache: every kernel is compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


# Sizes of 64 bits for one GPU: they change the addresses, and those are computed alike on all.
@pytest.mark.parametrize(
    "case, arch", [(case, arch) for case in CASES for arch in (80, 90, 100) if arch == 90 or "64-bit" not in case]
)
def test_kernels_keep_to_their_registers_and_move_16_bytes_at_a_time(case, arch, triton_cache):
    kernel, arguments, block, ceiling, at_least = CASES[case]
    ptx, cubin = compile_for(arch, kernel, arguments, {"BLOCK": block})
    check_machine_code(ptx, cubin, triton_cache, ceiling, at_least)
    if case == "leap_residuals, fp8":
        check_that_ptxas_changes_no_access(ptx, triton_cache)
    if case != "write":
        assert "cvt.rn.bf16" in ptx, (
            "results are rounded to nearest (the interpreter cuts them, so only this test sees it)"
        )
        assert "fma.rn.f32" in ptx
    assert not re.search(r"\b(mul|add|sub)\.f32", ptx), "what the source does not fuse is not fused"


def check_machine_code(ptx, cubin, folder, ceiling, at_least, stack_bytes=0):
    """Registers a thread; bytes that spill; 16-byte loads and stores of global memory, which ptxas takes over from the
    PTX as they are.
    """
    (folder / "kernel.cubin").write_bytes(cubin)
    usage = dump("-res-usage", folder / "kernel.cubin")
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    assert registers <= ceiling
    assert stack <= stack_bytes and not local, "registers spill"
    assert all(found >= least for found, least in zip(wide_accesses(ptx), at_least, strict=True))


def wide_accesses(ptx):
    """16-byte loads and stores of global memory."""
    return [len(re.findall(rf"\b{word}\.global\S*\.v4\.b32", ptx)) for word in ("ld", "st")]


def check_that_ptxas_changes_no_access(ptx, folder):
    """By a dump of the machine code, which takes longer than most kernels take to compile."""
    sass = dump("-sass", folder / "kernel.cubin")
    assert [len(re.findall(rf"\b{word}\.\S*128", sass)) for word in ("LDG", "STG")] == wide_accesses(ptx)
    assert not re.search(r"\b(LDL|STL)\b", sass)


TOKENS, ROW = ("*bf16", "i32", "i32"), ("*bf16", "i32")
SIZES = {"eps": "fp32", "tokens": "i32", "size": "i32"}
NORM = {"s": TOKENS, "g": TOKENS, "scale": ROW, "of_x": "*bf16"}
TWICE = {"g_2": TOKENS, "scale_2": ROW}
GATE = {"g_total": TOKENS, "gate": ROW, "of_y": "*bf16"}
LAYER, SUMMED = {"IS_LAYER": True}, {"OF_MODULATION": True}

# What of modulation.py a GPU runs most, and the largest of each kind: kernel, its arguments (those not named are None),
# its constants, registers a thread at most, and 16-byte loads and stores for every 8 numbers a thread.
MODULATIONS = {
    "two layer norms": (
        modulation.forward,
        {"x": TOKENS, "shift": ROW, "scale": ROW, "shift_2": ROW, "scale_2": ROW, "out": "*bf16", "out_2": "*bf16"},
        LAYER,
        72,
        (5, 2),
    ),
    "RMS norm": (modulation.forward, {"x": TOKENS, "weight": "*bf16", "scale": ROW, "out": "*bf16"}, {}, 48, (3, 1)),
    "gated residual, layer norm": (
        modulation.forward,
        {"x": TOKENS, "y": TOKENS, "gate": ROW, "shift": ROW, "scale": ROW, "total": "*bf16", "out": "*bf16"},
        LAYER,
        64,
        (5, 2),
    ),
    "backward of a layer norm": (modulation.backward, NORM, LAYER, 64, (3, 1)),
    "backward of a gated residual": (modulation.backward, GATE, {}, 48, (2, 1)),
    "backward of a gated residual, layer norm": (modulation.backward, NORM | GATE, LAYER, 64, (5, 2)),
    "backward of two layer norms, with sums": (
        modulation.backward,
        NORM | TWICE | {"parts": "*fp32"},
        LAYER | SUMMED,
        128,
        (5, 1 + 4 * 2),
    ),
    "backward of an RMS norm, with sums": (
        modulation.backward,
        NORM | {"weight": "*bf16", "parts": "*fp32"},
        SUMMED,
        72,
        (4, 1 + 2),
    ),
    "backward of a gated residual, layer norm, with sums": (
        modulation.backward,
        NORM | GATE | {"y": TOKENS, "parts": "*fp32"},
        LAYER | SUMMED,
        128,
        (6, 2 + 3 * 2),
    ),
}


def heads(kind, streams=2, rope="real", backward=False, of_weights=False):
    """The arguments of a kernel of qk_norm, in tensors of one kind."""
    names = ["queries", "keys", "queries_2", "keys_2"][: 2 * streams]
    tensors = names + ["weight_q", "weight_k", "weight_q_2", "weight_k_2"][: 2 * streams]
    tensors += ["g_q", "g_k", *(f"of_{name}" for name in names)] if backward else ["q", "k"]
    tables = ["cos", "sin"] if rope == "real" else ["cos"] if rope else []
    strides = dict.fromkeys(["strides", "strides_2", *(["strides_g"] if backward else [])], STRIDES)
    sizes = dict.fromkeys(["rope_stride", "tokens", "heads", "width", *(["tokens_2"] if backward else [])], "i32")
    parts = {"parts": "*fp32"} if of_weights else {}
    return dict.fromkeys(tensors, kind) | dict.fromkeys(tables, "*fp32") | strides | sizes | {"eps": "fp32"} | parts


def rows_of(kernel, kind):
    """The arguments of a kernel of activations: tensors, and sizes in 32 bits."""
    return {name: "i32" if name in ALIGNED else kind for name in kernel.arg_names if name != "BLOCK"}


# kernel, its arguments, width of a head or of a block, registers a thread at most, 16-byte loads and stores
NETWORK = {
    "qk_norm, SD3.5": (qk_norm.kernel, heads("*bf16", rope=None), 64, 48, (1, 1)),
    "qk_norm, FLUX": (qk_norm.kernel, heads("*bf16"), 128, 64, (1, 1)),
    "qk_norm, Z-Image": (qk_norm.kernel, heads("*bf16", 1, "pairs"), 128, 64, (1, 1)),
    "qk_norm, fp32": (qk_norm.kernel, heads("*fp32"), 128, 64, (2, 2)),
    "its gradient, SD3.5": (qk_norm.backward_kernel, heads("*bf16", 2, None, True), 64, 80, (2, 1)),
    "its gradient, FLUX": (qk_norm.backward_kernel, heads("*bf16", 2, "real", True), 128, 96, (2, 1)),
    "its gradient, Z-Image": (qk_norm.backward_kernel, heads("*bf16", 1, "pairs", True), 128, 80, (2, 1)),
    "its gradient, and the weights'": (
        qk_norm.backward_kernel,
        heads("*bf16", 2, "real", True, True),
        128,
        128,
        (2, 1),
    ),
    "its gradient, fp32": (qk_norm.backward_kernel, heads("*fp32", 2, "real", True, True), 128, 128, (4, 2)),
    "swiglu": (activations.swiglu_kernel, rows_of(activations.swiglu_kernel, "*bf16"), None, 40, (3, 2)),
    "swiglu's gradient": (
        activations.swiglu_backward_kernel,
        rows_of(activations.swiglu_backward_kernel, "*bf16"),
        None,
        40,
        (3, 2),
    ),
    "gelu": (activations.gelu_kernel, rows_of(activations.gelu_kernel, "*bf16"), None, 40, (2, 2)),
    "gelu's gradient": (
        activations.gelu_backward_kernel,
        rows_of(activations.gelu_backward_kernel, "*bf16"),
        None,
        40,
        (2, 1),
    ),
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", NETWORK)
def test_kernels_of_a_network_keep_to_their_registers_and_move_16_bytes_at_a_time(case, arch, triton_cache):
    kernel, arguments, width, ceiling, at_least = NETWORK[case]
    if width is None:
        constants = {"BLOCK": activations.BLOCK}
    else:
        constants = {"HEADS": qk_norm.BLOCK // width, "DIM": width, "TOKENS": qk_norm.TOKENS}
    ptx, cubin = compile_for(arch, kernel, arguments, constants)
    check_machine_code(ptx, cubin, triton_cache, ceiling, at_least)
    if "fp32" not in case:
        assert "cvt.rn.bf16" in ptx, "results are rounded to nearest"
    assert not re.search(r"\b(mul|add|sub)\.f32", ptx), "what the source does not fuse is not fused"


def test_the_row_lengths_of_the_known_networks_share_three_binaries():
    """SD3.5 medium and large, FLUX.1, Z-Image, a wider one and FLUX.2."""
    for size, block in ((1536, 2048), (2432, 4096), (3072, 4096), (3840, 4096), (4096, 4096), (6144, 8192)):
        assert size % 16 == 0 and modulation.options(size)["BLOCK"] == block


@pytest.mark.parametrize("block, arch", [(2048, 90), (4096, 80), (4096, 100), (8192, 90)])
@pytest.mark.parametrize("case", MODULATIONS)
def test_modulation_keeps_a_row_in_registers(case, block, arch, triton_cache):
    """Of 8192 numbers a thread has 16, and 512 threads may have 128 registers each. That is not enough for three sums
    beside a row, which a network asks for only where its modulation is trained too.
    """
    kernel, arguments, constants, ceiling, at_least = MODULATIONS[case]
    constants = {"IS_LAYER": False, "OF_MODULATION": False, "CHUNK": 4, "BLOCK": block} | constants
    ptx, cubin = compile_for(arch, kernel, arguments | SIZES, constants, modulation.options(block))
    wide = block // 4096 or 1
    spills = 128 if wide > 1 and "with sums" in case else 0
    check_machine_code(ptx, cubin, triton_cache, min(wide * ceiling, 128), [wide * count for count in at_least], spills)
    assert re.search(r"\b(cvt\.rn|(mul|fma)(\.rn)?)\.bf16", ptx), "results are rounded to nearest"
    assert not re.search(r"\b(mul|add|sub)\.f32", ptx), "what the source does not fuse is not fused"
