"""Builds the compiled ops of flowbp_kernels; everything else about the package is in pyproject.toml.

The extension is written against LibTorch's stable ABI and touches no Python header: one binary serves every
torch >= 2.10 and every Python >= 3.11. The CUDA kernels include no torch header: nvcc compiles them on its own, so
that a machine with neither GPU nor CUDA torch builds them too.

FLOWBP_BUILD=0        install without compiled ops; they then run on plain PyTorch
FLOWBP_CUDA=auto|0|1  CUDA kernels if a toolkit is found (default), never, or else fail
FLOWBP_CUDA_ARCHS     compute capabilities, "80;90;100" by default; the last one also as PTX, for later devices
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

WAY_OUT = "To install without compiled ops, on plain PyTorch, set FLOWBP_BUILD=0."
CPU_SOURCES = ["csrc/bindings.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/baseline.cpp"]
CUDA_SOURCES = sorted(Path("csrc/cuda").glob("*.cu"))


def switch(name: str, default: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in values:
        raise SystemExit(f"flowbp: {name} must be one of {', '.join(values)}; not {value!r}")
    return value


def cuda_toolkit() -> Path | None:
    """The CUDA toolkit at CUDA_HOME if that is set; else in /usr/local/cuda, or where the nvcc on PATH lies."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME")
    for root in [home] if home else ["/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]:
        if root and (Path(root) / "bin/nvcc").exists() and (Path(root) / "include/cuda_runtime_api.h").exists():
            return Path(root)
    return None


def cuda_archs() -> list[str]:
    archs = os.environ.get("FLOWBP_CUDA_ARCHS", "80;90;100").split(";")
    if not all(arch.isdigit() for arch in archs):
        raise SystemExit(f'flowbp: FLOWBP_CUDA_ARCHS must be compute capabilities as in "80;90", not {";".join(archs)!r}')
    return archs


def cuda_objects(toolkit: Path, archs: list[str], folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu, and returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    headers = max(path.stat().st_mtime for path in (*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")))
    objects = []
    for source in CUDA_SOURCES:
        target = folder / f"{source.stem}_{'_'.join(archs)}.o"
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
            subprocess.run([toolkit / "bin/nvcc", *flags, *targets, "-c", source, "-o", target], check=True)
        objects.append(str(target))
    return objects


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
            f"flowbp: no C++ compiler: {compiler!r} is not on PATH.\nInstall one (g++ or clang++), or point CXX at yours. {WAY_OUT}"
        )
    with_cuda, toolkit = switch("FLOWBP_CUDA", "auto", ("auto", "0", "1")), cuda_toolkit()
    if with_cuda == "1" and toolkit is None:
        raise SystemExit(
            "flowbp: FLOWBP_CUDA=1, but no CUDA toolkit (bin/nvcc with include/cuda_runtime_api.h) lies at CUDA_HOME; without\n"
            "CUDA_HOME, /usr/local/cuda and the nvcc on PATH are tried. Install one or set CUDA_HOME; FLOWBP_CUDA=0 builds for the CPU."
        )
    archs = cuda_archs() if toolkit is not None and with_cuda != "0" else []
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # 2.10: the oldest torch the binary runs on
    cuda_link = []
    if archs:
        macros += [("FLOWBP_CUDA", "1"), ("FLOWBP_CUDA_ARCHS", f'"{" ".join(archs)}"')]
        libraries = next(path for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir())
        cuda_link = [f"-L{libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    class Build(BuildExtension):
        def build_extensions(self):
            if archs:
                self.extensions[0].extra_objects = cuda_objects(toolkit, archs, Path(self.build_temp) / "cuda")
            super().build_extensions()

    extension = CppExtension(
        "flowbp_kernels._C",
        CPU_SOURCES,
        define_macros=macros,
        # No contraction: where a product and a sum are fused, the source says so, and every backend does.
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-Wno-maybe-uninitialized"],
        extra_link_args=cuda_link,
        depends=[str(path) for path in Path("csrc").rglob("*")],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**(compiled_ops() if switch("FLOWBP_BUILD", "1", ("0", "1")) == "1" else {}))
