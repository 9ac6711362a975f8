"""Which backend runs: FLOWBP_KERNELS, a missing extension, a broken one; and what a build that cannot run says."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowbp_kernels
from flowbp_kernels import backend, quadrature_update

PACKAGE = Path(flowbp_kernels.__file__).parent
SETUP = Path(__file__).parents[2] / "setup.py"
UPDATE = (torch.ones(2, 3), torch.ones(1, 2, 3), [0], [0.5])


@pytest.fixture
def choose(monkeypatch):
    return lambda choice: monkeypatch.setenv("FLOWBP_KERNELS", choice)


@pytest.fixture
def extension_at(monkeypatch):
    """Makes `backend` look for its extension at a path of the test's choice."""

    def pretend(path):
        monkeypatch.setattr(backend, "extension_path", lambda: path)
        backend._load_extension.cache_clear()

    yield pretend
    backend._load_extension.cache_clear()


def test_auto_takes_the_compiled_kernel_where_it_can(choose):
    choose("auto")
    expected = "cpu" if backend.extension_path() else "reference"
    assert backend.select("quadrature_update", x=torch.ones(2)) == expected
    assert backend.select("quadrature_update", x=torch.ones(2, dtype=torch.float64)) == "reference"
    assert backend.select("quadrature_update", num_nodes=backend.MAX_NODES + 1, x=torch.ones(2)) == "reference"


def test_the_reference_runs_where_it_is_asked_for(choose):
    choose("reference")
    assert backend.select("quadrature_update", x=torch.ones(2)) == "reference"
    assert (quadrature_update(*UPDATE) == 1.5).all()


def test_an_explicit_choice_never_falls_back(choose, extension_at):
    choose("cpu")
    if backend.extension_path() is not None:
        with pytest.raises(RuntimeError, match="FLOWBP_KERNELS=cpu cannot run quadrature_update: x is torch.float64"):
            quadrature_update(UPDATE[0].double(), *UPDATE[1:])
    extension_at(None)
    with pytest.raises(RuntimeError, match="FLOWBP_KERNELS=cpu cannot run quadrature_update: its extension is not built"):
        quadrature_update(*UPDATE)


def test_an_unknown_choice_raises_and_lists_the_known_ones(choose):
    choose("gpu")
    with pytest.raises(ValueError, match="one of auto, cuda, triton, cpu, reference; not 'gpu'"):
        quadrature_update(*UPDATE)


def test_a_broken_extension_is_named_and_auto_goes_on(choose, extension_at, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    extension_at(str(broken))
    choose("auto")
    with pytest.warns(RuntimeWarning, match="_C.abi3.so failed"):
        assert (quadrature_update(*UPDATE) == 1.5).all()
    choose("cpu")
    with pytest.raises(RuntimeError, match="_C.abi3.so failed"):
        quadrature_update(*UPDATE)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_choice_without_its_device_says_so(choose, name):
    choose(name)
    with pytest.raises(RuntimeError, match=f"FLOWBP_KERNELS={name} cannot run quadrature_update: x is on cpu"):
        quadrature_update(*UPDATE)


@pytest.mark.parametrize("archs, capability, runs", [
    ("80 90 100", (7, 5), False), ("80 90 100", (8, 6), True), ("80 90 100", (9, 0), True), ("80 90 100", (12, 0), True),
    ("86 90", (8, 0), False), ("90", (8, 9), False), ("100 90", (9, 0), True),
])  # fmt: skip
def test_a_gpu_without_machine_code_or_ptx_is_told_apart(archs, capability, runs, monkeypatch):
    monkeypatch.setattr(backend, "cuda_archs", archs.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = backend._no_machine_code.__wrapped__(0)
    assert runs == (why == "") and (runs or f"compute capability {capability[0]}.{capability[1]}" in why)


def test_an_instruction_set_that_is_not_there_is_refused(choose, monkeypatch):
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    choose("cpu")
    monkeypatch.setenv("FLOWBP_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="FLOWBP_ISA=avx1024 is not an instruction set of this processor"):
        quadrature_update(*UPDATE)
    for isa in backend.isas():
        monkeypatch.setenv("FLOWBP_ISA", isa)
        assert backend.isa() == isa and (quadrature_update(*UPDATE) == 1.5).all()


def test_a_way_to_read_a_cache_that_is_not_there_is_refused(choose, monkeypatch):
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    choose("cpu")
    monkeypatch.setenv("FLOWBP_ROWS", "some")
    with pytest.raises(RuntimeError, match="FLOWBP_ROWS must be few or all, not some; unset it"):
        quadrature_update(*UPDATE)
    for rows in ("few", "all"):
        monkeypatch.setenv("FLOWBP_ROWS", rows)
        assert backend.rows() == rows and (quadrature_update(*UPDATE) == 1.5).all()


def test_the_report_has_a_row_a_backend():
    rows = {name: (runs, why) for name, runs, why in backend.report()}
    assert tuple(rows) == backend.BACKENDS and rows["reference"][0]
    assert all(why for _, why in rows.values())
    if rows["cpu"][0]:
        assert backend.isa() in rows["cpu"][1] and f"{backend.rows()} rows" in rows["cpu"][1]


def test_the_package_works_without_its_extension(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "flowbp_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    script = (
        "import runpy, torch, flowbp_kernels as fk; assert fk.backend.extension_path() is None;"
        "assert (fk.quadrature_update(torch.ones(2, 3), torch.ones(1, 2, 3), [0], [0.5]) == 1.5).all();"
        "runpy.run_module('flowbp_kernels', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FLOWBP_KERNELS": "auto"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert ["reference", "yes", "plain PyTorch, any device and dtype"] in rows
    assert any(row[:2] == ["cpu", "no"] and "not built" in row[2] for row in rows)


def test_the_table_of_ops_names_every_op():
    for name in flowbp_kernels.__all__:
        assert name == "RngState" or f"\n{name} " in flowbp_kernels.__doc__


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"CXX": "no-such-compiler"}, "no C.. compiler: 'no-such-compiler'(.|\n)*FLOWBP_BUILD=0"),
        ({"FLOWBP_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FLOWBP_CUDA=1, but no CUDA toolkit(.|\n)*FLOWBP_CUDA=0"),
        ({"FLOWBP_CUDA": "maybe"}, "FLOWBP_CUDA must be one of auto, 0, 1; not 'maybe'"),
        ({"FLOWBP_BUILD": "yes"}, "FLOWBP_BUILD must be one of 0, 1; not 'yes'"),
    ],
)
def test_a_build_that_cannot_run_says_what_is_missing(monkeypatch, environment, message):
    monkeypatch.delenv("FLOWBP_BUILD", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SETUP))


def test_a_build_without_torch_says_so(monkeypatch):
    monkeypatch.delenv("FLOWBP_BUILD", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="need torch >= 2.10 at build time(.|\n)*FLOWBP_BUILD=0"):
        runpy.run_path(str(SETUP))


def test_a_build_against_an_old_torch_says_so(monkeypatch):
    monkeypatch.delenv("FLOWBP_BUILD", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SystemExit, match="need torch >= 2.10, not 2.9.1"):
        runpy.run_path(str(SETUP))
