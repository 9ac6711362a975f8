"""Builds the compiled ops of flowbp_kernels; everything else about the package is in pyproject.toml.

The extension is written against LibTorch's stable ABI and touches no Python header: one binary serves every
torch >= 2.10 and every Python >= 3.10. FLOWBP_BUILD=0 installs without it, and the ops then run on plain PyTorch.
"""

import os
import shutil

from setuptools import setup

WAY_OUT = "To install without compiled ops, on plain PyTorch, set FLOWBP_BUILD=0."


def compiled_ops() -> dict:
    try:
        from torch import __version__ as torch_version
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"flowbp: the compiled ops need torch >= 2.10 at build time, and importing it failed: {error}.\n"
            f"Install torch first, then run pip with --no-build-isolation. {WAY_OUT}"
        ) from error
    if tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 10):
        raise SystemExit(f"flowbp: the compiled ops need torch >= 2.10, not {torch_version}. Upgrade torch. {WAY_OUT}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(
            f"flowbp: no C++ compiler: {compiler!r} is not on PATH.\n"
            f"Install one (g++ or clang++), or point CXX at yours. {WAY_OUT}"
        )
    extension = CppExtension(
        "flowbp_kernels._C",
        ["csrc/quadrature_update.cpp"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10: the oldest torch the binary runs on
        extra_compile_args=["-O3", "-fvisibility=hidden"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


switch = os.environ.get("FLOWBP_BUILD", "1")
if switch not in ("0", "1"):
    raise SystemExit(f"flowbp: FLOWBP_BUILD must be 1 (compile the ops; default) or 0 (plain PyTorch), not {switch!r}")
setup(**(compiled_ops() if switch == "1" else {}))
