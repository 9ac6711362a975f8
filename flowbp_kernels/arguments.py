"""What the ops accept: one check for each kind of argument. Each error names the value, the rule and the way out."""

import sys
from array import array
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_traced() -> bool:
    """Whether something compiles, traces or fakes this call, or watches it through a dispatch mode."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def with_whole_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies of those whose last dimension is strided: the kernels of a network take all other strides."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must have a float dtype, not {tensor.dtype}; convert it with .float()")


def check_number(name: str, value: float | Tensor) -> None:
    """A real number that float64 can hold, or a real tensor."""
    if isinstance(value, Tensor):
        real = not value.is_complex()
    else:
        real = isinstance(value, float) or (isinstance(value, Real) and abs(value) <= sys.float_info.max)
    if not real:
        raise ValueError(f"{name} must be a real number or tensor, not {repr(value)[:80]}")


def check_like(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """A float tensor of other's shape, on its device."""
    check_float(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; they must be equal"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; move them together")


def check_cache(velocities: Tensor, x: Tensor, scales: Tensor | None) -> None:
    """velocities [N, B, *S] float, for x [B, *S]; scales None or [N, B] float32."""
    check_float("velocities", velocities)
    if x.dim() < 1 or velocities.shape[1:] != x.shape:
        raise ValueError(
            f"velocities must be [N, *x.shape], the cache of a rollout of x; got {tuple(velocities.shape)} for x of "
            f"shape {tuple(x.shape)}"
        )
    if velocities.device != x.device:
        raise ValueError(f"x is on {x.device} and velocities on {velocities.device}; move them together")
    if velocities.dtype.itemsize == 1 and velocities.requires_grad:
        raise ValueError(f"a {velocities.dtype} cache cannot hold a gradient: pass velocities.detach()")
    if scales is not None and (
        scales.shape != velocities.shape[:2] or scales.dtype != torch.float32 or scales.device != x.device
    ):
        raise ValueError(
            f"scales must be float32 [N, B] = {list(velocities.shape[:2])} on {x.device}, one a step and sample; "
            f"got {scales.dtype} {list(scales.shape)} on {scales.device}"
        )


def node_table(nodes: Tensor | Sequence, x: Tensor) -> Tensor:
    """Integers as an int64 tensor [K, 1] or [K, B]. A tensor on x's device stays there; all else is on the CPU."""
    table = _placed("nodes", nodes, x) if isinstance(nodes, Tensor) else _numbers("nodes", nodes, "q")
    if (table.dtype.is_floating_point or table.is_complex()) and table.numel():
        raise ValueError(f"nodes must be integers, not {table.dtype}")
    return _columns("nodes", table.long(), x.shape[0])


def weight_table(name: str, weights: Tensor | Sequence, x: Tensor) -> Tensor:
    """Numbers as a float64 tensor [K, 1] or [K, B] without gradient. A tensor on x's device stays there; all else is on
    the CPU.
    """
    table = _placed(name, weights, x) if isinstance(weights, Tensor) else _numbers(name, weights, "d")
    check_number(name, table)
    return _columns(name, table.double(), x.shape[0])


def scalar_table(x: Tensor, nodes: Tensor | None = None, **scalars: float | Tensor) -> Tensor:
    """Numbers and tensors [] as one float64 tensor without gradient: where the nodes of their rule lie; without nodes,
    on x's device if one of the tensors is there, else on the CPU.
    """
    rule: list[tuple[str, Tensor]] = [] if nodes is None else [("nodes", nodes)]
    tensors = [(name, value) for name, value in scalars.items() if isinstance(value, Tensor)]
    for name, value in scalars.items():
        check_number(name, value)
    for name, value in tensors:
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dimensional tensor, not of shape {tuple(value.shape)}")
        _placed(name, value, x)
        first_name, first = (rule or tensors)[0]
        check_together(name, value, first, first_name)
    # Sums, because torch.compile needs no graph for each value of a float that is added to a tensor.
    zero = torch.zeros((), dtype=torch.float64, device=next((t.device for _, t in rule + tensors), None))
    return torch.stack([zero + value for value in scalars.values()]).detach()


def check_rows(name: str, table: Tensor, other: Tensor, other_name: str) -> None:
    if table.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} has {table.shape[0]} rows and {other_name} {other.shape[0]}; each needs one row a node"
        )
    check_together(name, table, other, other_name)


def check_together(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """Either all parts of one rule travel by value, or all of them lie on the device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} comes from {tensor.device} and {other_name} from {other.device}: "
            "pass both as numbers or CPU tensors, or both on the device"
        )


def check_nodes(nodes: Tensor, velocities: Tensor) -> None:
    """Every node that travels by value is a row of the cache. This reads values, so it can be called where an op runs
    and not where it is traced.
    """
    if not nodes.is_cpu and nodes.shape[0] and not velocities.shape[0]:
        raise ValueError(f"there are {nodes.shape[0]} nodes and no velocities")
    if nodes.is_cpu and nodes.numel():
        values = nodes.flatten().tolist()
        low, high = min(values), max(values)
        if low < 0 or high >= velocities.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(f"node {bad} is not in the cache; its {velocities.shape[0]} velocities count from 0")


def check_out(
    name: str, out: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype], inputs: Sequence
) -> None:
    """`out` can be written into: it is contiguous, of this shape, of one of these dtypes and on the inputs' device, and
    no gradient is recorded.
    """
    if out is None:
        return
    if (
        out.shape != torch.Size(shape)
        or out.dtype not in dtypes
        or out.device != inputs[0].device
        or not out.is_contiguous()
    ):
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} must be contiguous, of shape {list(shape)} and {allowed}, on {inputs[0].device}; "
            f"got {list(out.shape)} {out.dtype} on {out.device}, strides {list(out.stride())}"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, out)):
        raise ValueError(
            f"writing into {name} records no gradient: run under torch.no_grad(), detach the inputs, or leave {name} "
            "out"
        )


def _numbers(name: str, values: Sequence, typecode: str) -> Tensor:
    """A list of numbers as float64 ("d") or int64 ("q"), at a third of the cost of torch.tensor. Any other values go to
    torch.tensor.
    """
    dtype = torch.float64 if typecode == "d" else None
    if is_traced():  # a buffer can be neither traced nor empty
        return torch.tensor(values, dtype=dtype)
    try:
        return torch.frombuffer(array(typecode, values), dtype=dtype or torch.int64)
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        return torch.tensor(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers or a tensor, not {repr(values)[:80]}: {error}") from error


def _placed(name: str, values: Tensor, x: Tensor) -> Tensor:
    """A tensor of the CPU or of x's device, without its gradient."""
    if not values.is_cpu and values.device != x.device:
        raise ValueError(
            f"{name} is on {values.device} and the tensors on {x.device}: move it there, or pass {name}.cpu(), which "
            "travels by value"
        )
    return values.detach() if values.requires_grad else values


def _columns(name: str, table: Tensor, batch: int) -> Tensor:
    if table.dim() == 1:
        return table.unsqueeze(1).contiguous()
    if table.dim() != 2 or table.shape[1] not in (1, batch):  # [K, 1] is what one op's backward hands to another
        raise ValueError(f"{name} must be [K] or [K, B] with B = {batch}, not of shape {tuple(table.shape)}")
    return table.contiguous()
