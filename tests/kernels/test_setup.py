"""What setup.py decides on another machine: its toolkit's layout, the architectures its nvcc knows, its compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.emulate.build import kept

from flowbp_kernels import backend

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup.py"
HEADER, LIBRARY = "include/cuda_runtime_api.h", "libcudart_static.a"


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, where no variable that it reads is set."""
    for name in ("FLOWBP_BUILD", "FLOWBP_CUDA", "FLOWBP_CUDA_ARCHS", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("flowbp_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path, script):
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def toolkit(root, headers="include", libraries="lib64", knows="", script="exit 1"):
    """A folder that looks like a CUDA toolkit. Its nvcc lists the capabilities it `knows`, and else runs `script`."""
    listing = "; ".join(f"echo compute_{arch}" for arch in knows.split())
    program(root / "bin/nvcc", f'if [ "$1" = --list-gpu-arch ]; then {listing or "exit 2"}; exit; fi\n{script}')
    for file in (root / headers / "cuda_runtime_api.h", root / libraries / LIBRARY):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


CONDA = "targets/x86_64-linux"


@pytest.mark.parametrize("machine, headers, libraries", [
    ("x86_64", "include", "lib64"),  # NVIDIA's installer
    ("x86_64", "include", "lib"),  # NVIDIA's wheels
    ("x86_64", f"{CONDA}/include", f"{CONDA}/lib"),
    ("x86_64", "include", "lib/x86_64-linux-gnu"),  # Debian, where root is /usr
    ("aarch64", "targets/sbsa-linux/include", "targets/sbsa-linux/lib"),
])  # fmt: skip
def test_a_toolkit_is_found_in_every_layout(setup_py, tmp_path, monkeypatch, machine, headers, libraries):
    monkeypatch.setattr(setup_py.platform, "machine", lambda: machine)
    found = setup_py.toolkit_at(toolkit(tmp_path, headers, libraries))
    assert found == (tmp_path / "bin/nvcc", tmp_path / libraries)


@pytest.mark.parametrize("lacking", ["bin/nvcc", f"{CONDA}/{HEADER}", f"{CONDA}/lib/{LIBRARY}"])
def test_a_folder_that_lacks_a_part_is_no_toolkit(setup_py, tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(setup_py.platform, "machine", lambda: "x86_64")
    toolkit(tmp_path, f"{CONDA}/include", f"{CONDA}/lib")
    (tmp_path / lacking).unlink()
    assert setup_py.toolkit_at(tmp_path) is None


def test_a_toolkit_for_another_machine_is_none(setup_py, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_py.platform, "machine", lambda: "aarch64")
    assert setup_py.toolkit_at(toolkit(tmp_path, f"{CONDA}/include", f"{CONDA}/lib")) is None


def test_cuda_home_comes_before_the_nvcc_on_path(setup_py, tmp_path, monkeypatch):
    home, on_path = toolkit(tmp_path / "home", knows="80"), toolkit(tmp_path / "conda", knows="80 90")
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:{os.environ['PATH']}")
    assert setup_py.cuda_plan() == ((on_path / "bin/nvcc", on_path / "lib64"), ["80", "90"], "")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py.cuda_plan() == ((home / "bin/nvcc", home / "lib64"), ["80"], "")


def test_an_nvcc_on_path_without_its_toolkit_is_passed_over(setup_py, tmp_path, monkeypatch):
    wrapper = program(tmp_path / "bin/nvcc", 'exec /elsewhere/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_py.toolkit_roots() == [tmp_path, Path("/usr/local/cuda")] and setup_py.toolkit_at(tmp_path) is None


@pytest.mark.parametrize("knows, archs", [
    ("52 75 80 86 90", "80 90"),  # before 12.8
    ("75 80 86 90 100 120", "80 90 100"),
    ("90 100 120", "90 100"),
])  # fmt: skip
def test_what_nvcc_does_not_know_is_not_built(setup_py, tmp_path, knows, archs):
    assert setup_py.cuda_archs(toolkit(tmp_path, knows=knows) / "bin/nvcc") == archs.split()


@pytest.mark.parametrize("wanted, knows, message", [
    ("90;100", "80 90", "knows, as in .80;90., not .90;100.; it knows 80, 90[.]"),
    ("9.0", "80 90", "not .9[.]0.; it knows 80, 90"),
    ("", "52 61", "not .80;90;100.; it knows 52, 61"),
    ("90", "", "--list-gpu-arch failed"),
])  # fmt: skip
def test_an_architecture_that_cannot_be_built_is_named(setup_py, tmp_path, monkeypatch, wanted, knows, message):
    monkeypatch.setenv("FLOWBP_CUDA_ARCHS", wanted)
    with pytest.raises(SystemExit, match=f"{message}(.|\n)*CUDA_HOME names another toolkit(.|\n)*FLOWBP_CUDA=0"):
        setup_py.cuda_archs(toolkit(tmp_path, knows=knows) / "bin/nvcc")


def test_why_there_are_no_cuda_kernels_is_said(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.cuda_plan()[2].endswith(f"libcudart_static.a) in {tmp_path}")
    assert setup_py.compiled_ops()[1].endswith(f"by c++, none for CUDA: {setup_py.cuda_plan()[2]}")
    monkeypatch.setenv("FLOWBP_CUDA", "0")
    assert setup_py.cuda_plan() == (None, [], "FLOWBP_CUDA=0")


def test_what_is_built_for_cuda_is_said(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, knows="80 90")))
    assert setup_py.compiled_ops()[1].endswith(f"by c++, for CUDA (sm_80, sm_90 and PTX) by {tmp_path}/bin/nvcc")


def test_an_nvcc_that_fails_says_what_to_set(setup_py, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    nvcc = toolkit(tmp_path, knows="80", script="echo unsupported GNU version >&2; exit 1") / "bin/nvcc"
    message = "does not compile csrc/cuda(.|\n)*CXX another host compiler(.|\n)*FLOWBP_CUDA=0"
    with pytest.raises(SystemExit, match=message):
        setup_py.cuda_objects(nvcc, ["80"], tmp_path / "objects")
    assert "unsupported GNU version" in capfd.readouterr().err


def test_nvcc_is_given_the_architectures_and_the_host_compiler(setup_py, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    compiler = program(tmp_path / "g++-42", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert setup_py.host_compiler() == []
    monkeypatch.setenv("CXX", "ccache g++-42")
    nvcc = toolkit(tmp_path, knows="80 90", script=f'echo "$@" >> {tmp_path}/calls') / "bin/nvcc"
    setup_py.cuda_objects(nvcc, ["80", "90"], tmp_path / "objects")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    for call in calls:
        assert f"-ccbin={compiler} " in call
        for code in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"):
            assert f"-gencode=arch={code} " in call


@pytest.mark.parametrize("environment, message", [
    ({"CXX": "no-such-compiler"}, "no C.. compiler: 'no-such-compiler'(.|\n)*FLOWBP_BUILD=0"),
    ({"FLOWBP_CUDA": "1", "CUDA_HOME": "/none"}, "FLOWBP_CUDA=1, but no CUDA toolkit .* in /none(.|\n)*FLOWBP_CUDA=0"),
    ({"FLOWBP_CUDA": "maybe"}, "FLOWBP_CUDA must be one of auto, 0, 1; not 'maybe'"),
])  # fmt: skip
def test_a_build_that_cannot_run_says_what_is_missing(setup_py, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        setup_py.compiled_ops()


def test_a_build_without_torch_says_so(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="need torch >= 2.10 at build time(.|\n)*FLOWBP_BUILD=0"):
        setup_py.compiled_ops()


def test_a_build_against_an_old_torch_says_so(setup_py, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SystemExit, match="need torch >= 2.10, not 2.9.1"):
        setup_py.compiled_ops()


# -- builds ------------------------------------------------------------------------------------------------------------


def build(folder, **environment):
    """`setup.py build` into a folder; returns the finished process."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLOWBP_")}
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)


def test_a_compiler_that_fails_says_what_to_set(tmp_path):
    compiler = program(tmp_path / "c++", 'case "$*" in *csrc*) echo no such dialect >&2; exit 1; esac')
    run = build(tmp_path / "build", CXX=str(compiler), FLOWBP_CUDA="0")
    assert run.returncode and "no such dialect" in run.stdout + run.stderr
    assert f"{compiler} does not build the compiled ops" in run.stderr and "FLOWBP_BUILD=0" in run.stderr


def test_a_build_without_compiled_ops_says_why(tmp_path):
    run = build(tmp_path, FLOWBP_BUILD="0")
    assert run.stdout.splitlines()[-1] == "flowbp: built no compiled ops: FLOWBP_BUILD=0"
    run = build(tmp_path, FLOWBP_BUILD="yes")
    assert "FLOWBP_BUILD must be one of 1, 0; not 'yes'" in run.stderr


RESULTS = """
import os
import torch
from flowbp_kernels import backend, quadrature_update
values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)[None]
x, cache = torch.linspace(-1, 1, 3 * 4097).view(3, 4097), torch.linspace(-3, 2, 6 * 4097).sin().view(2, 3, 4097)
results = {}
for isa in backend.isas():
    os.environ["FLOWBP_ISA"] = isa
    kept = quadrature_update(values, values[None], [0], [0.0])
    results[isa] = [kept, quadrature_update(x, cache, [0, 1], [0.3, -0.7])]
"""
OF_ANOTHER = f"""
import sys
from flowbp_kernels import backend
backend.extension_path = lambda: sys.argv[1]
{RESULTS}
torch.save(results, sys.argv[2])
"""


@pytest.fixture(params=["g++-11 -O1", "clang++ -O3"])
def compiler(request):
    """A compiler that optimizes as setup.py says (-O3), or less; in the folder of what it makes."""
    name, level = request.param.split()
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not on PATH")
    return program(kept(f"by-{name}", name) / name, f'exec {shutil.which(name)} "$@" {level}')


def test_another_compiler_builds_ops_with_the_same_bits(compiler, tmp_path, monkeypatch):
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    folder = compiler.parent
    run = build(folder, CXX=str(compiler), FLOWBP_CUDA="0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f" by {compiler}, none for CUDA: FLOWBP_CUDA=0" in run.stdout.splitlines()[-1]
    (built,) = folder.glob("lib*/flowbp_kernels/_C.abi3.so")
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    monkeypatch.setenv("FLOWBP_ISA", "")  # to be put back: what follows sets it
    subprocess.run([sys.executable, "-c", OF_ANOTHER, built, tmp_path / "results"], check=True)  # a process loads one
    theirs = torch.load(tmp_path / "results")
    exec(RESULTS, names := {})
    assert names["results"].keys() == theirs.keys() == set(backend.isas())
    for isa, tensors in names["results"].items():
        for one, other in zip(tensors, theirs[isa], strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), isa
