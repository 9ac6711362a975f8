"""The Triton kernels, in Triton's interpreter on any machine and compiled on a GPU; test_triton_aot.py compiles them
without one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("triton_cases.py", "triton_qk_norm_cases.py", "triton_modulation_cases.py", "triton_launches_cases.py")


@pytest.fixture
def process():
    """Runs the cases in a process of their own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install flowbp[triton])", exc_type=ImportError)
    cases = [Path(__file__).with_name(name) for name in CASES]

    def run_cases(interpreted):
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        root = Path(__file__).parents[2]
        run = subprocess.run([*command, *cases], env=environment, cwd=root, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]

    return run_cases


def test_the_kernels_in_the_interpreter(process):
    process(interpreted=True)


def test_the_kernels_on_the_gpu(gpu, process):
    process(interpreted=False)


def test_importing_the_package_imports_no_kernel(new_process):
    new_process("import sys, flowbp_kernels; assert not any('flowbp_kernels._triton' in name for name in sys.modules)")
