"""Compiles csrc/cuda/*.cu with g++ against cuda_on_cpu.h, by ninja: into a Python module, or into a program under a
sanitizer. What was compiled of the same sources by the same compiler is not compiled again.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
KERNELS = sorted(path for path in (CSRC / "cuda").glob("*.cu") if path.stem != "device")  # which asks a driver
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-Wno-psabi", f"-I{CSRC}", "-pthread"]
X86_64 = ["-mavx2", "-mfma", "-mf16c"]


def missing() -> str:
    """What this machine lacks for it; "" if nothing."""
    lacking = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=_path()) is None]
    lacking += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return f"{' and '.join(lacking)} not found" if lacking else ""


def kept(name: str, compiler: str) -> Path:
    """The folder of this checkout for what `compiler` makes of the C++ and CUDA sources as they are now."""
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for path in sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.*") if path.is_file()):
        if path.suffix != ".pyc":
            digest.update(path.name.encode() + path.read_bytes())
    folder = HERE.parents[2] / "build/tests" / f"{name}-{digest.hexdigest()[:16]}"
    for other in folder.parent.glob(f"{name}-*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def module() -> Path:
    """The emulated kernels as a Python module; returns its path. Its calls wait for threads, so that optimized code
    would be no faster.
    """
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-O0", *X86_64, "-fvisibility=hidden", *includes]
    return _build("emulated", "emulated.so", [*KERNELS, HERE / "module.cpp"], flags, ["-shared"])


# Bugs that a sanitizer must find, and the source whose behaviour each changes.
PLANTS = {"PLANT_OUT_OF_BOUNDS": "sanitize", "PLANT_NO_SYNCTHREADS": "leap_residuals"}


# AddressSanitizer takes longer to compile optimized code than its program runs; ThreadSanitizer's program runs longest.
OPTIMIZED = {"address": "-O0", "thread": "-O1"}
FLOAT32 = f"-include {HERE / 'float32_only.h'}"  # of what sanitize.cpp runs
SOURCES = [*KERNELS, CSRC / "cpu" / "avx2.cpp", CSRC / "cpu" / "baseline.cpp", HERE / "sanitize.cpp"]


def program(sanitizer: str, plant: str = "") -> Path:
    """sanitize.cpp and all kernels under `address` or `thread`; returns the program's path. What a plant leaves alone
    is built once.
    """
    check = f"-fsanitize={sanitizer}"
    flags = ["-g", OPTIMIZED[sanitizer], *X86_64, check, FLOAT32]
    return _build(sanitizer, f"sanitized{plant}", SOURCES, flags, [check], plant=plant)


def program_for(compiler: str) -> Path:
    """sanitize.cpp and all kernels by a cross compiler, statically linked, without sanitizer; returns the program's
    path.
    """
    return _build("crossed", "crossed", SOURCES, ["-O2", FLOAT32], ["-static"], compiler=compiler)


def _build(name: str, target: str, sources: list[Path], flags, link, plant="", compiler="g++") -> Path:
    folder = kept(name, compiler)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"rule compile\n  command = {compiler} {' '.join(FLAGS + flags)} $extra -c $in -o $out",
        f"rule link\n  command = {compiler} -pthread {' '.join(link)} $in -o $out",
    ]
    objects = []
    for source in sources:
        planted = source.stem == PLANTS.get(plant)
        extra = f"-D{plant} " if planted else ""
        extra += f"-include {HERE / 'cuda_on_cpu.h'} -x c++" if source.suffix == ".cu" else ""
        objects.append(f"{source.stem}{plant if planted else ''}.o")
        lines.append(f"build {objects[-1]}: compile {source}\n  extra = {extra}")
    lines.append(f"build {target}: link {' '.join(objects)}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    ninja = shutil.which("ninja", path=_path())
    run = subprocess.run([ninja, "-C", str(folder), target], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{run.stdout}{run.stderr}")
    return folder / target


def _path() -> str:
    """PATH, and where the ninja of this interpreter's environment lies."""

    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
