"""What equal bytes rest on: a math library whose rounding does not depend on addresses in memory, and one CPU thread.

MKL multiplies matrices for torch on x86-64. On some processors it orders a sum by the address of its input. A network
whose weights were read from a file then rounds otherwise than the same network that training has in memory. In MKL's
reproducible mode there is one order. MKL reads the mode from the environment at its first call, and never again.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE = "MKL_CBWR"
TOO_LATE = (
    "MKL multiplied matrices before its reproducible mode was asked for, and runs may differ in their last bits: set "
    f"{MODE}=AUTO in the environment, or find out what uses torch so early"
)


def request_equal_bytes() -> bool:
    """Ask MKL for its reproducible mode, unless the environment names one. False if that comes too late.

    This function loads nothing, so that a process can call it before all else.
    """
    os.environ.setdefault(MODE, "AUTO")
    return "torch" not in sys.modules or mkl_is_reproducible() is not False


def mkl_is_reproducible() -> bool | None:
    """What MKL says of its own mode; asking settles the mode. None if there is no MKL, or it cannot be asked."""
    import torch

    if not torch.backends.mkl.is_available():
        return None
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    mode_of = getattr(library, "mkl_serv_cbwr_get", None)
    branch, off = 1, 1  # MKL_CBWR_BRANCH and MKL_CBWR_BRANCH_OFF of mkl.h
    return None if mode_of is None else mode_of(branch) != off


def math_library() -> str:
    """In words: torch's library of matrix products, and whether equal numbers have equal products in it."""
    import torch

    if not torch.backends.mkl.is_available():
        return "not MKL: whether equal numbers give equal bytes at every address is not known"
    modes = {True: "reproducible", False: f"not reproducible: {TOO_LATE}", None: "in a mode that it does not tell"}
    return f"MKL, {modes[mkl_is_reproducible()]} ({MODE}={os.environ.get(MODE, '')})"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's CPU operations on one thread. To be faster, start more processes.

    The last bits of a sum depend on the number of threads that share it. Threads also wait for each other in every
    operation, so that one core that another program keeps busy stops them all; processes wait a few times a step.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
