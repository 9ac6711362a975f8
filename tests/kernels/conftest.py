import inspect
import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from flowbp_kernels import backend

ISAS = backend.isas()  # of the compiled ops on this processor; none without them


@pytest.fixture(scope="module", autouse=True)  # a package of no __init__ is the whole session to pytest
def threads_of_the_kernels():
    """Two, on a machine of one core too: the C++ ops share rows out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def builtins_of_the_interpreter():
    """Triton's interpreter looks for the builtins among all that triton.language holds, at every launch and at every
    call of a device function, which is a third of its time. Here it looks once.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def members(package):
        return [(name, getattr(package, name)) for name in names(package)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", SimpleNamespace(**vars(inspect) | {"getmembers": members}))
        yield


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture
def new_process():
    """Runs a script in a process of its own, which imports everything anew; returns what it printed."""

    def run(script, cwd=None, **environment):
        command = [sys.executable, "-c", script]
        ended = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """The compiled ops in each instruction set of this processor."""
    monkeypatch.setenv("FLOWBP_KERNELS", "cpu")
    monkeypatch.setenv("FLOWBP_ISA", request.param)
    return request.param


@pytest.fixture(params=["reference", *ISAS])
def everywhere(request, monkeypatch):
    """The reference, and the compiled ops in each instruction set of this processor."""
    monkeypatch.setenv("FLOWBP_KERNELS", "reference" if request.param == "reference" else "cpu")
    if request.param != "reference":
        monkeypatch.setenv("FLOWBP_ISA", request.param)
    return request.param
