"""Which backend runs an op, and why: the fastest that can take the tensors at hand, or the one FLOWBP_KERNELS names.

FLOWBP_KERNELS=auto (default) | cpu (compiled, from csrc/) | reference (plain PyTorch, runs everything).
A backend named there runs or raises with the cause; only `auto` falls back. The extension is loaded at the first call.
torch.compile settles the choice while it traces.
"""

import functools
import os
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

BACKENDS = ("cpu", "reference")  # in the order in which `auto` tries them


def select(**why_not: str) -> str:
    """The backend to run. why_not: by backend, what keeps it from these tensors, or "" if nothing does."""
    wanted = requested()
    for name in BACKENDS if wanted == "auto" else (wanted,):
        if name == "reference":
            return name
        cause = unavailable(name) or why_not.get(name, "this op has no such kernel")
        if not cause:
            return name
        if wanted == name:
            raise RuntimeError(
                f"FLOWBP_KERNELS={name} cannot run: {cause}. FLOWBP_KERNELS=auto picks a backend that can."
            )
    raise AssertionError("the reference runs everything")


@torch.compiler.assume_constant_result
def requested() -> str:
    """The value of FLOWBP_KERNELS, checked."""
    wanted = os.environ.get("FLOWBP_KERNELS", "auto")
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"FLOWBP_KERNELS must be one of auto, {', '.join(BACKENDS)}; not {wanted!r}")
    return wanted


@torch.compiler.assume_constant_result
def unavailable(name: str) -> str:
    """Why this installation cannot run a backend at all; "" if it can."""
    return _load_extension() if name == "cpu" else ""


@functools.cache
def _load_extension() -> str:
    path = extension_path()
    if path is None:
        return "its extension is not built (pip install --no-build-isolation . builds it unless FLOWBP_BUILD=0)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = f"loading {path} failed: {error}"
        warnings.warn(f"flowbp_kernels runs without its compiled ops: {cause}", RuntimeWarning, stacklevel=2)
        return cause
    return ""


def report() -> list[tuple[str, bool, str]]:
    """(backend, whether it runs here, why or from where) for every backend, in the order in which `auto` tries them."""
    rows = []
    for name in BACKENDS:
        cause = unavailable(name)
        good = "plain PyTorch, any device and dtype" if name == "reference" else extension_path()
        rows.append((name, not cause, cause or good))
    return rows


def extension_path() -> str | None:
    """Where the compiled extension lies, beside this file; None if it was not built."""
    spec = PathFinder.find_spec("_C", [str(Path(__file__).parent)])
    return spec.origin if spec else None
