"""What nvcc made of the CUDA kernels: no spills, 16-byte loads, few enough registers, and a verdict on the driver.

The machine code is read from the compiled extension, so that it is the code that runs, and nothing is compiled twice.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flowbp_kernels import backend

CSRC = Path(__file__).parents[2] / "csrc"
MAX_REGISTERS = 128  # of a thread: at least two blocks of 256 on an SM


@pytest.fixture
def cuobjdump():
    """Of a toolkit, or of the wheel of triton."""
    spec = importlib.util.find_spec("triton")
    wheel = (
        [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in spec.submodule_search_locations] if spec else []
    )
    for candidate in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump", *wheel):
        if candidate and Path(candidate).exists():
            return str(candidate)
    pytest.skip("cuobjdump is not on PATH, in /usr/local/cuda/bin nor in a triton wheel")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_machine_code_is_within_its_budget(arch, cuobjdump):
    if not backend.isas() or arch not in backend.cuda_archs():
        pytest.skip(f"the extension holds no kernels for sm_{arch}: there was no CUDA toolkit when it was built")
    command = [cuobjdump, "-arch", f"sm_{arch}", backend.extension_path()]
    usage, sass = (
        subprocess.run([*command, option], check=True, capture_output=True, text=True).stdout
        for option in ("-res-usage", "-sass")
    )
    functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    for kernel in ("update", "leaps", "sum_partials", "step", "seeds"):
        assert any(kernel in name for name, *_ in functions), kernel
    for name, registers, stack, local in functions:
        assert int(registers) <= MAX_REGISTERS, f"{name} takes {registers} registers"
        assert int(stack) == int(local) == 0, f"{name} keeps {stack} + {local} bytes in local memory"
    bodies = dict(part.split("\n", 1) for part in re.split(r"\n\s*Function : ", sass)[1:])
    assert bodies.keys() >= {name for name, *_ in functions}
    for name, body in bodies.items():
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name} spills"
        is_wide = re.findall(r"Lb([01])E", name)[:1] == ["1"]  # kWide is the first of a kernel's facts
        if is_wide and "float8" not in name:  # eight float8 are 8 bytes
            assert re.search(r"LDG\.E\.128", body), f"{name} has no 16-byte load"
        if is_wide:
            assert re.search(r"STG\.E\S*\.128", body) and not re.search(r"STG\.E\.U16", body), (
                f"{name} stores piecemeal"
            )


ASK = """
#include "ops.h"
#include <cstdio>
int main() {
  const auto v = flowbp::cuda_verdict();
  std::printf("%s|%d|%d", v.error ? v.error : "", v.driver, v.runtime);
}
"""


@pytest.fixture
def nvcc():
    """The compiler of a toolkit that has its headers."""
    for candidate in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return candidate
    pytest.skip("nvcc is not on PATH nor in /usr/local/cuda")


def test_a_driver_older_than_the_runtime_is_found_without_a_launch(nvcc, tmp_path):
    """No driver at all is the oldest: CUDA counts it as version 0."""
    (tmp_path / "ask.cpp").write_text(ASK)
    sources, options = [tmp_path / "ask.cpp", CSRC / "cuda/device.cu"], ["-std=c++17", "-cudart=static", f"-I{CSRC}"]
    subprocess.run([nvcc, *options, "-o", tmp_path / "ask", *sources], check=True, capture_output=True)
    answer = subprocess.run([tmp_path / "ask"], check=True, capture_output=True, text=True).stdout
    error, driver, runtime = answer.split("|")
    if int(driver):
        pytest.skip(f"a driver is installed here: {answer}")
    assert error == "CUDA driver version is insufficient for CUDA runtime version"
    assert int(runtime) >= 11080  # the oldest toolkit that has float8
