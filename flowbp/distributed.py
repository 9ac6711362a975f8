"""Several processes, one gradient: which rows of the global batch a process trains, and when gradients are reduced over all of them.

A step runs many backward passes. Reducing gradients in each would multiply the communication, and DistributedDataParallel cannot tell which
of several kept graphs is the last; so every forward pass runs without synchronisation, and the last backward pass alone is armed:

    with ranks.accumulating():
        ...  # rollout, reward
        backward(plan, trajectory, velocity.replay, g, before_last=ranks.reduce_with)

Every process draws the plans of the whole batch from the same generator, so that all run the same number of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from flowbp.backbones import Backbone
from flowbp.guidance import Conditioning

__all__ = ["Ranks", "VelocityModule", "full", "gathered", "laid_out_as", "process_state"]


def process_state() -> PartialState:
    """This process among those of the run. A CPU is asked for by name, or processes on CPUs would not know of one another."""
    return PartialState(cpu=not torch.accelerator.is_available())


class VelocityModule(nn.Module):
    """A backbone's velocity as a module: what DistributedDataParallel and fully_shard wrap, while the backbone stays as it is."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.denoiser, self.velocity = backbone.denoiser, backbone.velocity

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.velocity(x, sigma, conditioning)


class Ranks:
    """The processes of a run, and its network as they share it.

    network  (x, sigma, conditioning) -> velocity: the backbone's, through the wrapper of DDP; or in place, with the weights of its blocks
             sharded (FSDP2) if `shard`. One process wraps nothing.
    """

    def __init__(self, accelerator: Accelerator, backbone: Backbone, shard: bool = False):
        self.accelerator, self.size, self.rank = accelerator, accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self.network, self.sharded = VelocityModule(backbone), None
        if self.size > 1 and shard:
            self.sharded = shard_weights(backbone.denoiser, accelerator.device)
        elif self.size > 1:
            self.network = replicate(self.network, accelerator.device)

    def rows(self, per_rank: int) -> slice:
        """This process's part of a global batch of size * per_rank rows."""
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes add to this process's gradient alone; none is reduced until `reduce_with` arms one."""
        if isinstance(self.network, DistributedDataParallel):
            with self.network.no_sync():
                yield
            return
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(False)
        yield

    def reduce_with(self, v: Tensor) -> None:
        """The next backward pass, that of `v`, averages all that was accumulated over the processes."""
        if isinstance(self.network, DistributedDataParallel):
            self.network.reducer.prepare_for_backward([v])
        elif self.sharded is not None:
            self.sharded.set_requires_gradient_sync(True)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value averaged over the processes."""
        if self.size == 1 or not values:
            return dict(values)
        table = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(table)
        return dict(zip(values, (table / self.size).tolist(), strict=True))

    def main_says(self, question: Callable[[], bool]) -> bool:
        """The main process's answer, on every process; it alone is asked. What decides on a collective call must be the same everywhere."""
        if self.size == 1:
            return question()
        answer = torch.tensor(int(self.is_main and question()), device=self.accelerator.device)
        torch.distributed.broadcast(answer, 0)
        return bool(answer)


def replicate(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP. Unused parameters are looked for: the last block of SD3 drops what some of its weights compute."""
    device_ids = None if device.type == "cpu" else [device]
    return DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=True, broadcast_buffers=False)


def shard_weights(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2, in place: the weights of a transformer block are gathered when it runs, and dropped after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in denoiser.modules():
        if type(block).__name__ in denoiser._no_split_modules:
            fully_shard(block, mesh=mesh)
    return fully_shard(denoiser, mesh=mesh)


# -- sharded tensors: every process must make these calls, for all of them take part -------------------------------------------------


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state dict, or any nesting of tensors, with its shards put together."""
    return tree_map(lambda leaf: full(leaf) if isinstance(leaf, Tensor) else leaf, state)


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole or sharded, as `parameter` is sharded, and on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
