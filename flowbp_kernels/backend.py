"""Which backend runs an op, and why: the fastest that takes the tensors at hand, or the one that FLOWBP_KERNELS names.

FLOWBP_KERNELS=auto (default) | cuda | cpu (compiled, from csrc/) | triton | reference (plain PyTorch, runs everything).
A backend named there runs or raises with the cause; only `auto` falls back. The extension is loaded at the first call.
FLOWBP_ISA=avx512 | avx2 | baseline names the instruction set of the compiled CPU ops; unset, the best there is.
FLOWBP_ROWS=few | all says how many rows of a cache the compiled CPU ops read side by side, which changes their speed
and no bit of a result. Unset, the faster one is measured at the first large call of a process, which then takes about
50 ms longer. The choice is made whenever an op runs, also inside a graph of torch.compile.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from flowbp_kernels.arguments import COMPILED_DTYPES, is_traced

BACKENDS = ("cuda", "triton", "cpu", "reference")  # in the order in which `auto` tries them
MAX_NODES = 256  # rows of a rule that a compiled kernel takes: kMaxTerms in csrc/ops.h


def needs_operator(*tensors: Tensor | None, records: bool = True) -> bool:
    """Whether a call must go through its registered operator: it records a gradient, or it is traced, compiled or
    faked.

    Any other call runs its kernel at once, because on a small latent the operator (20 us) would cost more than all the
    rest. Raises NotImplementedError within forward-mode differentiation and within the transforms of torch.func, of
    which the kernels know nothing: they would return tangents of zero.
    records: whether a gradient alone calls for the operator. Not where a torch.autograd.Function records it.
    """
    if is_traced():
        return True
    recording, forward = records and torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is None:
            continue
        if is_functorch_wrapped_tensor(tensor) or (forward and forward_ad.unpack_dual(tensor).tangent is not None):
            raise NotImplementedError(
                "the ops of flowbp_kernels have a gradient (torch.autograd), but no forward-mode derivative and no "
                "rule for the transforms of torch.func (jvp, vmap, grad): use the formula of the op's docstring there"
            )
        if type(tensor) not in (Tensor, Parameter) or (recording and tensor.requires_grad):
            return True
    return False


def written(name: str, out: Tensor, others: dict[str, Tensor | None], in_place_of: str = "") -> None:
    """Call before a kernel writes `out` while it reads the others. Raises ValueError where `out` overlaps one of them
    in memory, except `in_place_of`, which `out` may be. Tells autograd that the old value of `out` is gone.

    This reads addresses, so it can be called where an op runs and not where it is traced. Only contiguous tensors are
    compared: a strided one was copied, or runs on the reference, which reads everything before it writes.
    """
    start = out.data_ptr()
    end = start + out.nbytes if start else 0  # a meta tensor lies nowhere
    for other_name, other in others.items():
        if other is None:
            continue
        first = other.data_ptr()
        if first < end and start < first + other.nbytes and other.is_contiguous():
            if other_name != in_place_of or first != start or other.dtype != out.dtype:
                allowed = f", or {in_place_of} itself" if in_place_of else ""
                raise ValueError(
                    f"{name} and {other_name} overlap in memory, so that writing one spoils the other: "
                    f"make {name} a tensor of its own{allowed}"
                )
    torch.autograd.graph.increment_version(out)


def select(
    op: str, num_nodes: int = 0, *, in_rows: bool = False, one_dtype: bool = False, **tensors: Tensor | None
) -> str:
    """The backend that runs `op` on these tensors, named as in its contract, with a rule of num_nodes rows.

    in_rows: its kernels go through rows, whose strides are free: one for GPUs in Triton, and a compiled one for the
    CPU.  one_dtype: the latter takes tensors of one dtype.
    """
    wanted = requested()
    label, first = next(iter(tensors.items()))
    assert first is not None
    for name in BACKENDS if wanted == "auto" else (wanted,):
        if not _reaches(name, first):
            cause = f"{label} is on {first.device}" if name == wanted else "elsewhere"
        else:
            cause = _unsuited(name, op, num_nodes, in_rows, one_dtype, tensors)
        if not cause:
            return name
        if wanted == name:
            raise RuntimeError(
                f"FLOWBP_KERNELS={name} cannot run {op}: {cause}. FLOWBP_KERNELS=auto picks a backend that can."
            )
    raise AssertionError("the reference runs everything")


def requested() -> str:
    """The value of FLOWBP_KERNELS, checked."""
    wanted = os.environ.get("FLOWBP_KERNELS", "auto")
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"FLOWBP_KERNELS must be one of auto, {', '.join(BACKENDS)}; not {wanted!r}")
    return wanted


def unavailable(name: str, device: int | None = None) -> str:
    """Why a backend runs no op here; "" if it can run some. device: index of a GPU; None for torch's current one."""
    if name == "cpu":
        return _load_extension()
    if name == "triton":
        return _import_triton() or ("" if _interprets_triton() else _on_gpu(_no_triton, device))
    if name == "cuda":
        return _load_extension() or _not_built() or _on_gpu(_no_cuda, device)
    return ""


def triton_op(op: str, launcher: str = "") -> Callable:
    """The Triton launcher of an op, or another one of its file, such as that of its backward."""
    return getattr(importlib.import_module(f"flowbp_kernels._triton.{op}"), launcher or op)


def triton_tables(x: Tensor, nodes: Tensor | None, *weights: Tensor) -> Sequence[Tensor | None]:
    """The tables of a rule on x's device, as a Triton launcher takes them. Tables of the CPU travel by value."""
    if not weights[0].is_cpu:
        return nodes, *weights
    return importlib.import_module("flowbp_kernels._triton").carry(x.device, nodes, *weights)


def report() -> list[tuple[str, bool, str]]:
    """(backend, whether it runs here, what it is or why not) for every backend, in the order in which `auto` tries
    them.
    """
    good = {
        "cuda": lambda: f"compiled for {', '.join(f'sm_{arch}' for arch in cuda_archs())} and PTX",
        "triton": lambda: f"triton {importlib.import_module('triton').__version__}",
        "cpu": lambda: (
            f"{isa()} (of {', '.join(isas())} on this processor), {rows()} rows of a cache side by side, "
            f"{extension_path()}"
        ),
        "reference": lambda: "plain PyTorch, any device and dtype",
    }
    return [(name, not unavailable(name), unavailable(name) or good[name]()) for name in BACKENDS]


def isa() -> str:
    """The instruction set that the compiled CPU ops use."""
    return _compiled("isa")


def isas() -> list[str]:
    """The instruction sets of the compiled CPU ops that this processor has, best first; none without the extension."""
    return _compiled("isas").split()


def rows() -> str:
    """How many rows of a large cache the compiled CPU ops read side by side, `few` or `all`: FLOWBP_ROWS, or else what
    is fastest here.
    """
    return _compiled("rows")


def cuda_archs() -> list[str]:
    """The compute capabilities that the compiled CUDA ops were built for; none without CUDA or without the
    extension.
    """
    return _compiled("cuda_archs").split()


def extension_path() -> str | None:
    """Where the compiled extension lies, beside this file; None if it was not built."""
    spec = PathFinder.find_spec("_C", [str(Path(__file__).parent)])
    return spec.origin if spec else None


def _reaches(name: str, tensor: Tensor) -> bool:
    """Whether a backend works where the tensor lies."""
    if name == "cpu":
        return tensor.is_cpu
    return name == "reference" or tensor.is_cuda or (name == "triton" and _interprets_triton())


def _unsuited(
    name: str, op: str, num_nodes: int, in_rows: bool, one_dtype: bool, tensors: dict[str, Tensor | None]
) -> str:
    """What keeps a backend that reaches these tensors from running `op` on them; "" if nothing does."""
    if name == "reference":
        return ""
    first_label, first = next(iter(tensors.items()))
    assert first is not None
    cause = unavailable(name, first.device.index)
    if cause:
        return cause
    if name == "triton" and importlib.util.find_spec(f"flowbp_kernels._triton.{op}") is None:
        return f"flowbp_kernels/_triton/{op}.py does not exist"
    if in_rows and name == "cuda":
        return "its kernel for a GPU is the one in Triton"
    if in_rows and name == "cpu" and not _is_compiled(op):
        return f"{extension_path()} has no kernel of it: build it anew, if csrc/ has one by now"
    if num_nodes > MAX_NODES and name != "triton":
        return f"its {num_nodes} nodes exceed the {MAX_NODES} that a compiled kernel takes"
    for label, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in COMPILED_DTYPES and not (label == "velocities" and tensor.dtype == torch.float8_e4m3fn):
            return f"{label} is {tensor.dtype}; it takes float32, bfloat16 and float16, and float8_e4m3fn for a cache"
        if not in_rows and not tensor.is_contiguous():
            return f"{label} is not contiguous"
        if one_dtype and name == "cpu" and tensor.dtype != first.dtype:
            return f"{label} is {tensor.dtype} and {first_label} {first.dtype}; its compiled kernel takes one dtype"
    return ""


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


@functools.cache
def _is_compiled(op: str) -> bool:
    """Whether the extension, which is loaded, has an op."""
    return hasattr(torch.ops.flowbp_compiled, op)


@functools.cache
def _interprets_triton() -> bool:
    """Whether Triton runs its kernels on the CPU; Triton reads this once too, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _import_triton() -> str:
    if importlib.util.find_spec("flowbp_kernels._triton") is None:
        return "flowbp_kernels/_triton does not exist"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"importing triton failed: {error}"
    return ""


def _not_built() -> str:
    return "" if cuda_archs() else "the extension was built without CUDA (no toolkit was found, or FLOWBP_CUDA=0)"


def _on_gpu(refusal: Callable[[int], str], device: int | None) -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return refusal(torch.cuda.current_device() if device is None else device)


@functools.cache
def _no_cuda(device: int) -> str:
    """Why the compiled kernels do not load on a GPU; "" if they do. Asked once: the answer starts CUDA on that GPU."""
    error = _compiled("cuda_error", device)
    built = f"built for {', '.join(f'sm_{arch}' for arch in cuda_archs())} and PTX"
    way_out = "update the driver, or build here with this machine's toolkit and FLOWBP_CUDA_ARCHS"
    return error and f"its kernels, {built}, do not load on this GPU of {_capability(device)}: {error}; {way_out}"


@functools.cache
def _no_triton(device: int) -> str:
    """Why the Triton kernels do not compile for a GPU; "" if they do: bfloat16 needs capability 8.0."""
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return f"its kernels need compute capability 8.0, and this GPU is of {_capability(device)}"


def _capability(device: int) -> str:
    return "compute capability " + ".".join(map(str, torch.cuda.get_device_capability(device)))


def _compiled(question: str, *arguments: int) -> str:
    return "" if _load_extension() else getattr(torch.ops.flowbp_compiled, question)(*arguments)
