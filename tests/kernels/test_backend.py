"""Which backend runs: FLOWBP_KERNELS, a missing extension, a broken one, and GPUs that a backend cannot use."""

import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flowbp_kernels
from flowbp_kernels import backend, quadrature_update

PACKAGE = Path(flowbp_kernels.__file__).parent
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
    assert backend.select("quadrature_update", num_nodes=backend.MAX_NODES, x=torch.ones(2)) == expected
    assert backend.select("quadrature_update", num_nodes=backend.MAX_NODES + 1, x=torch.ones(2)) == "reference"


def test_the_reference_runs_where_it_is_asked_for(choose):
    choose("reference")
    assert backend.select("quadrature_update", x=torch.ones(2)) == "reference"
    assert (quadrature_update(*UPDATE) == 1.5).all()


def test_kernels_in_rows_take_any_strides_and_the_compiled_one_a_single_dtype(choose):
    x = torch.ones(2, 3, 8)
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    choose("auto")
    assert backend.select("modulation", in_rows=True, x=x[:, :, ::2]) == "cpu"
    assert backend.select("modulation", in_rows=True, one_dtype=True, x=x, scale=x.bfloat16()) == "reference"
    assert backend.select("an_op_of_tomorrow", in_rows=True, x=x) == "reference"
    choose("cpu")
    with pytest.raises(
        RuntimeError, match="scale is torch.bfloat16 and x torch.float32; its compiled kernel takes one"
    ):
        backend.select("modulation", in_rows=True, one_dtype=True, x=x, scale=x.bfloat16())
    with pytest.raises(RuntimeError, match="has no kernel of it: build it anew"):
        backend.select("an_op_of_tomorrow", in_rows=True, x=x)


def test_an_explicit_choice_never_falls_back(choose, extension_at):
    choose("cpu")
    if backend.extension_path() is not None:
        with pytest.raises(RuntimeError, match="FLOWBP_KERNELS=cpu cannot run quadrature_update: x is torch.float64"):
            quadrature_update(UPDATE[0].double(), *UPDATE[1:])
    extension_at(None)
    with pytest.raises(
        RuntimeError, match="FLOWBP_KERNELS=cpu cannot run quadrature_update: its extension is not built"
    ):
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


@dataclass
class Gpus:
    """GPUs that are not here: what the driver answers for each, its compute capability, and which were asked."""

    errors: list[str]
    capabilities: list[tuple[int, int]]
    asked: list[int] = field(default_factory=list)

    def compiled(self, question, *device):
        if question == "cuda_error":
            self.asked += device
            return self.errors[device[0]]
        return "80 90"  # cuda_archs

    def tensor(self, index):
        """What backend.select looks at."""
        where = {"is_cpu": False, "is_cuda": True, "device": torch.device("cuda", index)}
        return SimpleNamespace(**where, dtype=torch.float32, is_contiguous=lambda: True)


@pytest.fixture
def gpus(monkeypatch):
    """Makes `backend` see GPUs with these answers, a Triton that imports, and an extension that was built with CUDA."""

    def pretend(errors, capabilities):
        pretended = Gpus(errors, capabilities)
        monkeypatch.setattr(backend, "_load_extension", lambda: "")
        monkeypatch.setattr(backend, "_compiled", pretended.compiled)
        monkeypatch.setattr(backend, "_import_triton", lambda: "")
        monkeypatch.setattr(backend, "_interprets_triton", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        return pretended

    answers = backend._no_cuda, backend._no_triton
    for answer in answers:
        answer.cache_clear()
    yield pretend
    for answer in answers:
        answer.cache_clear()


KNOWN = "the driver knows CUDA 12.4, the kernels were built by 13.0"
OLD_DRIVER = f"CUDA driver version is insufficient for CUDA runtime version; {KNOWN}"


def test_auto_goes_on_where_the_driver_refuses_the_cuda_kernels(choose, gpus):
    here = gpus([OLD_DRIVER, ""], [(9, 0), (9, 0)])
    choose("auto")
    for _ in range(2):
        assert backend.select("quadrature_update", x=here.tensor(0)) == "triton"
        assert backend.select("quadrature_update", x=here.tensor(1)) == "cuda"
    assert here.asked == [0, 1]  # each GPU once, and none before a tensor lies there
    choose("cuda")
    with pytest.raises(RuntimeError, match=f"{KNOWN}; update the driver"):
        backend.select("quadrature_update", x=here.tensor(0))


def test_kernels_in_rows_have_none_in_cuda(choose, gpus):
    here = gpus([""], [(9, 0)])
    choose("auto")
    assert backend.select("modulation", in_rows=True, x=here.tensor(0)) == "triton"
    choose("cuda")
    with pytest.raises(RuntimeError, match="its kernel for a GPU is the one in Triton"):
        backend.select("modulation", in_rows=True, x=here.tensor(0))


def test_the_report_names_what_the_driver_says(gpus):
    gpus([OLD_DRIVER], [(7, 0)])
    (cuda, triton) = backend.report()[:2]
    assert cuda[:2] == ("cuda", False) and OLD_DRIVER in cuda[2]
    assert "built for sm_80, sm_90 and PTX, do not load on this GPU of compute capability 7.0" in cuda[2]
    why = "its kernels need compute capability 8.0, and this GPU is of compute capability 7.0"
    assert triton == ("triton", False, why)


@pytest.mark.parametrize("capability, runs", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_triton_needs_a_gpu_with_bfloat16(choose, gpus, capability, runs):
    here = gpus(["no kernel image"], [capability])
    choose("auto")
    assert backend.select("quadrature_update", x=here.tensor(0)) == ("triton" if runs else "reference")
    choose("triton")
    if not runs:
        with pytest.raises(RuntimeError, match="cannot run quadrature_update: its kernels need compute capability 8.0"):
            backend.select("quadrature_update", x=here.tensor(0))


def test_a_build_without_cuda_asks_no_driver(gpus, monkeypatch):
    gpus([], [])
    monkeypatch.setattr(backend, "_compiled", lambda question: "")
    assert backend.unavailable("cuda").startswith("the extension was built without CUDA")


@pytest.mark.parametrize(
    ("variable", "wrong", "says", "asked", "known"),
    [
        (
            "FLOWBP_ISA",
            "avx1024",
            "FLOWBP_ISA=avx1024 is not an instruction set of this processor",
            backend.isa,
            backend.isas,
        ),
        (
            "FLOWBP_ROWS",
            "some",
            "FLOWBP_ROWS must be few or all, not some; unset it",
            backend.rows,
            lambda: ["few", "all"],
        ),
    ],
    ids=["instruction set", "rows"],
)
def test_what_the_compiled_ops_do_not_know_is_refused(variable, wrong, says, asked, known, choose, monkeypatch):
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    choose("cpu")
    monkeypatch.setenv(variable, wrong)
    with pytest.raises(RuntimeError, match=says):
        quadrature_update(*UPDATE)
    for value in known():
        monkeypatch.setenv(variable, value)
        assert asked() == value and (quadrature_update(*UPDATE) == 1.5).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the baseline alone")
def test_every_instruction_set_of_the_processor_is_used():
    """As Linux tells them: a binary may lack what asks the processor, and would run its slowest code without a word."""
    if backend.extension_path() is None:
        pytest.skip(backend.unavailable("cpu"))
    flags = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {"avx512": avx512, "avx2": {"avx2", "fma", "f16c"}, "baseline": set()}
    assert backend.isas() == [isa for isa, needed in needs.items() if needed <= flags]


def test_the_report_has_a_row_a_backend():
    rows = {name: (runs, why) for name, runs, why in backend.report()}
    assert tuple(rows) == backend.BACKENDS and rows["reference"][0]
    assert all(why for _, why in rows.values())
    if rows["cpu"][0]:
        assert backend.isa() in rows["cpu"][1] and f"{backend.rows()} rows" in rows["cpu"][1]


def test_the_package_works_without_its_extension(new_process, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "flowbp_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    script = (
        "import runpy, torch, flowbp_kernels as fk; assert fk.backend.extension_path() is None;"
        "assert (fk.quadrature_update(torch.ones(2, 3), torch.ones(1, 2, 3), [0], [0.5]) == 1.5).all();"
        "runpy.run_module('flowbp_kernels', run_name='__main__')"
    )
    said = new_process(script, cwd=tmp_path, PYTHONPATH=str(tmp_path), FLOWBP_KERNELS="auto")
    rows = [line.split(maxsplit=2) for line in said.splitlines()]
    assert ["reference", "yes", "plain PyTorch, any device and dtype"] in rows
    assert any(row[:2] == ["cpu", "no"] and "not built" in row[2] for row in rows)


def test_the_table_of_ops_names_every_op():
    for name in flowbp_kernels.__all__:
        assert name == "RngState" or f"\n{name} " in flowbp_kernels.__doc__
