"""Which active nodes keep their graph while the rollout passes them. The sweep replays the others.

    always   replay every active node: one graph in memory, one more forward pass a node
    never    keep every graph: no second forward pass, memory grows with the active set
    auto     keep as many graphs as memory holds, the clean end's, which the sweep frees first; replay the others

All give the same gradient.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowbp_kernels.sweep import Graph

__all__ = ["Recompute"]


class Recompute:
    """Decides, node by node while a rollout runs, which graphs are kept. Hold on to it from step to step: `auto`
    learns.

    mode      "always", "never" or "auto"
    budget    bytes that kept graphs may take in mode "auto". None measures it: the first rollout weighs one graph, the
    first step keeps
              none, and from the second on kept graphs get what was still free when memory use was at its peak (reward
              graph, replays and optimizer included), less one graph's worth of slack. Ranks agree on the smallest
              count.
    rollouts  in a step

    Raises ValueError for an unknown mode, or for a budget outside of "auto".
    """

    def __init__(
        self, mode: Literal["always", "never", "auto"] = "always", budget: int | None = None, rollouts: int = 1
    ):
        if mode not in ("always", "never", "auto"):
            raise ValueError(f"recompute must be 'always', 'never' or 'auto', not {mode!r}")
        if budget is not None and (mode != "auto" or budget < 0):
            raise ValueError(
                f"a budget of {budget} bytes for kept graphs needs recompute='auto' (not {mode!r}) and must be 0 or "
                "more"
            )
        self.mode, self.budget = mode, budget
        self.unmeasured = rollouts  # that are still to pass before memory is measured
        self.graph_bytes: int | None = None  # what one node's graph holds, once weighed
        self.capacity: int | None = None  # graphs that fit, once known

    def begin(self, device: torch.device) -> None:
        """A rollout starts: in "auto" without a budget, the first of the second step settles how many graphs fit."""
        if self.graph_bytes is not None and self.capacity is None and self.unmeasured <= 0:
            self._settle(spare_bytes(device) - self.graph_bytes, device)
        self.unmeasured -= 1

    def keeps(self, remaining: int) -> bool:
        """Whether the graph of a node is recorded and kept; `remaining` counts the active nodes from this one to the
        clean end.
        """
        if self.mode != "auto":
            return self.mode == "never"
        return self.capacity is not None and remaining <= self.capacity

    def record(self, remaining: int, forward: Callable[[], Graph], device: torch.device) -> tuple[Graph | None, bool]:
        """(forward() if it is recorded at all, whether it is kept)."""
        if self.mode == "auto" and self.graph_bytes is None:
            graph, self.graph_bytes = weigh(forward, device)
            if self.budget is not None:
                self._settle(self.budget, device)
            return graph, self.keeps(remaining)
        return (forward(), True) if self.keeps(remaining) else (None, False)

    def _settle(self, budget: int, device: torch.device) -> None:
        self.capacity = max(0, budget) // max(1, self.graph_bytes or 0)
        if (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):  # every rank must run as many forward passes
            smallest = torch.tensor(self.capacity, device=device)
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
            self.capacity = int(smallest)


def weigh(forward: Callable[[], Graph], device: torch.device) -> tuple[Graph, int]:
    """forward() and the bytes that its graph holds: what the GPU's allocator handed out, or on a CPU what autograd
    saved.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        graph = forward()
        return graph, torch.cuda.memory_allocated(device) - before
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter) and not (
            owner.is_leaf and owner.requires_grad
        ):  # weights are there anyway
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = forward()
    return graph, sum(saved.values())


def spare_bytes(device: torch.device) -> int:
    """Memory that was still free when this process used the most it has used so far."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        raise ValueError(f"free memory cannot be measured on {device} here: give recompute='auto' a budget")
    available = next(
        int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
    )
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 1024 * (available - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) + resident
