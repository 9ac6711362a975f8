"""The Triton kernels, in Triton's interpreter on any machine and compiled on a GPU; test_triton_aot.py compiles them
without one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(interpreted):
    """triton_cases.py in a process of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install flowbp[triton])", exc_type=ImportError)
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(CASES)]
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    run_cases(interpreted=True)


@pytest.mark.gpu
def test_the_kernels_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    run_cases(interpreted=False)


def test_importing_the_package_imports_no_kernel():
    script = (
        "import sys, flowbp_kernels; sys.exit(any(name.startswith('flowbp_kernels._triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
