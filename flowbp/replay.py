"""Which active nodes keep their graph while the rollout passes them. The sweep replays the others.

    always   replay every active node: one graph in memory, one more forward pass a node
    never    keep every graph: no second forward pass, memory grows with the active set
    auto     keep as many graphs as memory holds and replay the other nodes; the kept ones are those at the clean end,
             which the sweep frees first

All give the same gradient.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowbp_kernels.sweep import Graph


class Recompute:
    """How many graphs a rollout keeps, counted from the clean end: none, all, or as many as fit.

    mode      "always" keeps none, "never" keeps all, "auto" as many as fit into memory
    budget    bytes that kept graphs may take in mode "auto". None: measure. Step 1 records one graph to learn its size
              and keeps none. From step 2 on, floor((memory free at the peak of step 1 - one graph) / graph size) graphs
              are kept. The peak holds the reward's graph, replays and the optimizer. Ranks agree on the smallest count.
    rollouts  in a step

    Use one object for all steps: what "auto" has measured stays in it. Raises ValueError for an unknown mode, or for a
    budget outside of "auto".
    """

    def __init__(
        self, mode: Literal["always", "never", "auto"] = "always", budget: int | None = None, rollouts: int = 1
    ):
        if mode not in ("always", "never", "auto"):
            raise ValueError(f"recompute must be 'always', 'never' or 'auto', not {mode!r}")
        if budget is not None and (mode != "auto" or budget < 0):
            raise ValueError(f"a budget of {budget} bytes needs recompute='auto', not {mode!r}, and must be 0 or more")
        self.mode, self.budget = mode, budget
        self.capacity: float | None = {"always": 0, "never": math.inf}.get(mode)  # graphs to keep; None: not known yet
        self.graph_bytes: int | None = None  # size of one node's graph in mode "auto", once recorded
        self.rollouts_left = rollouts  # of step 1, after which free memory is measured

    def begin(self, device: torch.device) -> None:
        """A rollout starts. The first one of step 2 measures how many graphs fit, unless that is known."""
        if self.capacity is None and self.graph_bytes is not None and self.rollouts_left <= 0:
            self.capacity = fitting(spare_bytes(device) - self.graph_bytes, self.graph_bytes, device)
        self.rollouts_left -= 1

    def record(self, remaining: int, forward: Callable[[], Graph], device: torch.device) -> tuple[Graph | None, bool]:
        """(the node's graph, whether to keep it). The graph is None where it is not wanted: forward() did not run.

        remaining: active nodes from this one to the clean end.
        """
        graph = None
        if self.mode == "auto" and self.graph_bytes is None:
            graph, self.graph_bytes = weigh(forward, device)
            if self.budget is not None:
                self.capacity = fitting(self.budget, self.graph_bytes, device)
        keep = self.capacity is not None and remaining <= self.capacity
        return (forward() if keep and graph is None else graph), keep


# -- measuring ---------------------------------------------------------------------------------------------------------


def fitting(available: int, graph_bytes: int, device: torch.device) -> int:
    """How many graphs fit into the available bytes. Ranks agree on the smallest count, because all of them must run
    equally many forward passes.
    """
    count = max(0, available) // max(1, graph_bytes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        smallest = torch.tensor(count, device=device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        count = int(smallest)
    return count


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
        is_weight = isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad)
        if not is_weight:  # weights are in memory anyway
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
    if not Path("/proc/meminfo").is_file():
        raise ValueError(f"free memory cannot be measured on {device} here: give recompute='auto' a budget")
    grown = proc_bytes("self/status", "VmHWM") - proc_bytes("self/status", "VmRSS")  # at its peak, beyond now
    return proc_bytes("meminfo", "MemAvailable") - grown


def proc_bytes(file: str, key: str) -> int:
    """The bytes that the line `key: N kB` of a file of /proc tells: in meminfo MemAvailable, in self/status VmRSS, what
    is resident now, and VmHWM, the most so far (getrusage's begins at the peak of the process that started this one).
    """
    lines = map(str.split, Path("/proc", file).read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == f"{key}:")
