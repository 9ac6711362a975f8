"""Builds the compiled ops of flowbp_kernels; everything else about the package is in pyproject.toml.

The extension is written against LibTorch's stable ABI and touches no Python header: one binary serves every
torch >= 2.10 and every Python >= 3.11. The CUDA kernels include no torch header: nvcc compiles them on its own, so
that a machine with neither GPU nor CUDA torch builds them too.

FLOWBP_BUILD=0        install without compiled ops; they then run on plain PyTorch
FLOWBP_CUDA=auto|0|1  CUDA kernels if a toolkit (11.8 or newer) is found (default), never, or else fail
FLOWBP_CUDA_ARCHS     compute capabilities, as in "80;90"; the last one also as PTX, for later devices. By default
                      those of 80, 90 and 100 that nvcc knows
CUDA_HOME             the toolkit; else that of the nvcc on PATH, else /usr/local/cuda
CXX                   the C++ compiler, nvcc's host compiler too; else c++, and nvcc's own choice
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from setuptools import setup
from setuptools.errors import CompileError, LinkError

WAY_OUT = "To install without compiled ops, on plain PyTorch, set FLOWBP_BUILD=0."
CUDA_WAY_OUT = "CUDA_HOME names another toolkit, CXX another host compiler; FLOWBP_CUDA=0 builds for the CPU alone."
CPU_SOURCES = ["csrc/bindings.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/baseline.cpp"]
CUDA_SOURCES = sorted(Path("csrc/cuda").glob("*.cu"))
CUDA_ARCHS = ("80", "90", "100")
HUSHED = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # g++'s own headers; clang's names
CUDA_TARGETS = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}  # by platform.machine()


class Toolkit(NamedTuple):
    nvcc: Path
    libraries: Path  # the folder of libcudart_static.a


def switch(name: str, values: tuple[str, ...]) -> str:
    """The environment's value of a switch, the first of its values by default."""
    value = os.environ.get(name, values[0])
    if value not in values:
        raise SystemExit(f"flowbp: {name} must be one of {', '.join(values)}; not {value!r}")
    return value


def toolkit_at(root: Path) -> Toolkit | None:
    """The CUDA toolkit in a folder, if it has compiler, headers and library. Conda's has them in targets/<machine>."""
    machine = platform.machine()
    folders = [root, *(root / "targets" / target for target in CUDA_TARGETS.get(machine, ()))]
    places = [folder / name for folder in folders for name in ("lib64", "lib", f"lib/{machine}-linux-gnu")]
    libraries = next((place for place in places if (place / "libcudart_static.a").exists()), None)
    headers = any((folder / "include/cuda_runtime_api.h").exists() for folder in folders)
    return Toolkit(root / "bin/nvcc", libraries) if headers and libraries and (root / "bin/nvcc").exists() else None


def toolkit_roots() -> list[Path]:
    """Where to look for a toolkit: CUDA_HOME if that is set; else where the nvcc on PATH lies, then /usr/local/cuda."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if home:
        return [Path(home)]
    return [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]


def cuda_archs(nvcc: Path) -> list[str]:
    """The compute capabilities to build for."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = [line.removeprefix("compute_") for line in listing.stdout.split()]
    if listing.returncode or not known:
        raise SystemExit(f"flowbp: {nvcc} --list-gpu-arch failed: {listing.stderr.strip()}\n{CUDA_WAY_OUT}")
    wanted = os.environ.get("FLOWBP_CUDA_ARCHS")
    archs = wanted.split(";") if wanted else [arch for arch in CUDA_ARCHS if arch in known]
    if not archs or not set(archs) <= set(known):
        raise SystemExit(
            f'flowbp: FLOWBP_CUDA_ARCHS must be compute capabilities that {nvcc} knows, as in "80;90", not '
            f"{wanted or ';'.join(CUDA_ARCHS)!r}; it knows {', '.join(known)}.\n{CUDA_WAY_OUT}"
        )
    return archs


def cuda_plan() -> tuple[Toolkit | None, list[str], str]:
    """(toolkit, compute capabilities, ""), or (None, [], why no CUDA kernels are built)."""
    wanted = switch("FLOWBP_CUDA", ("auto", "0", "1"))
    if wanted == "0":
        return None, [], "FLOWBP_CUDA=0"
    roots = toolkit_roots()
    toolkit = next(filter(None, map(toolkit_at, roots)), None)
    if toolkit is None:
        places = " or ".join(map(str, roots))
        why = f"no CUDA toolkit (bin/nvcc, cuda_runtime_api.h and libcudart_static.a) in {places}"
        if wanted == "1":
            raise SystemExit(f"flowbp: FLOWBP_CUDA=1, but {why}.\n{CUDA_WAY_OUT}")
        return None, [], why
    return toolkit, cuda_archs(toolkit.nvcc), ""


def host_compiler() -> list[str]:
    """nvcc's option that names CXX its host compiler; none where CXX is unset."""
    words = os.environ.get("CXX", "").split()
    path = shutil.which(words[-1]) if words else None  # the last word: "ccache g++"
    return [f"-ccbin={path}"] if path else []


def cuda_objects(nvcc: Path, archs: list[str], folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu, and returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
    flags += host_compiler()
    headers = max(path.stat().st_mtime for path in (*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")))
    objects = []
    for source in CUDA_SOURCES:
        target = folder / f"{source.stem}_{'_'.join(archs)}.o"
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            command = [nvcc, *flags, *targets, "-c", source, "-o", target]
            if subprocess.run(command).returncode:
                raise SystemExit(f"flowbp: {nvcc} does not compile {source}; it says why above.\n{CUDA_WAY_OUT}")
        objects.append(str(target))
    return objects


def compiled_ops() -> tuple[dict, str]:
    """(setup's arguments, what they build and why)."""
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
            f"Install one (g++ 11 or clang++ 14, or newer), or point CXX at yours. {WAY_OUT}"
        )
    toolkit, archs, why_not = cuda_plan()
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # 2.10: the oldest torch the binary runs on
    cuda_link = []
    if toolkit:
        macros += [("FLOWBP_CUDA", "1"), ("FLOWBP_CUDA_ARCHS", f'"{" ".join(archs)}"')]
        cuda_link = [f"-L{toolkit.libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    class Build(BuildExtension):
        def build_extensions(self):
            if toolkit:
                self.extensions[0].extra_objects = cuda_objects(toolkit.nvcc, archs, Path(self.build_temp) / "cuda")
            try:
                super().build_extensions()
            except (RuntimeError, CompileError, LinkError) as error:
                raise SystemExit(
                    f"flowbp: {compiler} does not build the compiled ops; it says why above.\n"
                    f"CXX names another compiler (g++ 11 or clang++ 14, or newer). {WAY_OUT}"
                ) from error

    extension = CppExtension(
        "flowbp_kernels._C",
        CPU_SOURCES,
        define_macros=macros,
        # No contraction: where a product and a sum are fused, the source says so, and every backend does.
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *HUSHED],
        extra_link_args=cuda_link,
        depends=[str(path) for path in Path("csrc").rglob("*.*")],
        py_limited_api=True,
    )
    arguments = {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }
    isas = "avx512, avx2, baseline" if platform.machine() == "x86_64" else "baseline"
    of_cuda = f"none for CUDA: {why_not}"
    if toolkit:
        of_cuda = f"for CUDA ({', '.join(f'sm_{arch}' for arch in archs)} and PTX) by {toolkit.nvcc}"
    return arguments, f"compiled ops for the CPU ({isas}) by {compiler}, {of_cuda}"


if __name__ == "__main__":
    wanted = switch("FLOWBP_BUILD", ("1", "0")) == "1"
    arguments, built = compiled_ops() if wanted else ({}, "no compiled ops: FLOWBP_BUILD=0")
    commands = setup(**arguments).have_run
    if any(commands.get(name) for name in ("build", "build_ext", "editable_wheel")):
        print(f"flowbp: built {built}")
