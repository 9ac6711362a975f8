"""Several processes, one gradient: which rows of the global batch a process trains, and how the gradients of all become
their mean.

A step runs many backward passes, all of which add to the process's own gradient; it is averaged over the processes once
a step:

    with ranks.averaging():
        ...  # rollout, reward
        backward(plan, trajectory, velocity.replay, g, before_last=ranks.reduce_with)

Copied weights: when the block ends, one all-reduce a parameter. Each process holds the gradient that it would hold
alone, and no buckets of DistributedDataParallel, which reduces in the first backward pass unless told which of them is
the last, and wants to know then which parameters took part in all. Sharded weights (FSDP2): the last backward pass, or
with `memory.shard_gradients` each, reduces and splits it.

Every process draws the plans of the whole batch from the same generator, so that all run the same number of forward
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import ModelMixin
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from flowbp.backbones import Backbone

__all__ = ["Ranks", "gathered", "on_main", "process_state", "shard_like", "unshard"]


def process_state() -> PartialState:
    """This process among those of the run. A CPU is asked for by name, or processes on CPUs would not know of one
    another.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def on_main(work: Callable[[], object]) -> None:
    """Let the main process do `work` while the others wait for it."""
    state = process_state()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


class Ranks:
    """The processes of a run, and its network as they share it, which this puts on the device with the rest of the
    pipeline.

    shard            split the weights of the network's blocks over the processes (FSDP2): a block is moved to the
    device and split before
                     the next one is, so that no device ever holds the whole network
    shard_gradients  split gradients too after every backward pass, not in the last of a step alone
    """

    def __init__(
        self, accelerator: Accelerator, backbone: Backbone, shard: bool = False, shard_gradients: bool = False
    ):
        self.accelerator, self.size, self.rank = accelerator, accelerator.num_processes, accelerator.process_index
        self.shard_gradients, self.sharded = shard_gradients, None
        if self.size > 1 and shard:
            self.sharded = shard_weights(backbone.denoiser, accelerator.device)
        backbone.pipe.to(accelerator.device)
        self.trained = [p for p in backbone.denoiser.parameters() if p.requires_grad]
        if self.size > 1 and not shard:
            for p in self.trained:  # copies start equal
                torch.distributed.broadcast(p.detach(), 0)

    def rows(self, per_rank: int) -> slice:
        """This process's part of a global batch of size * per_rank rows."""
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """One optimizer step's backward passes: what they leave in the parameters' .grad is averaged over the
        processes.
        """
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(self.shard_gradients)
        yield
        if self.size > 1 and self.sharded is None:
            gradients = [p.grad.div_(self.size) for p in self.trained if p.grad is not None]
            for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]

    def reduce_with(self, v: Tensor) -> None:
        """The next backward pass, that of `v`, is the last of the step: it reduces sharded gradients."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(True)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value averaged over the processes."""
        if self.size == 1 or not values:
            return dict(values)
        table = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(table)
        return dict(zip(values, (table / self.size).tolist(), strict=True))


def shard_weights(denoiser: ModelMixin, device: torch.device) -> Any:
    """FSDP2, in place, on `device`: the weights of a transformer block are gathered when it runs, and dropped after.

    Gradients add up and are reduced in float32 (or wider), as the released trainers reduce them, and then rounded to
    the weights' dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(denoiser.dtype, torch.float32))
    options = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)), "mp_policy": policy}
    for block in denoiser.modules():
        if type(block).__name__ in denoiser._no_split_modules:
            fully_shard(block, **options)
    return fully_shard(denoiser, **options)


# -- sharded tensors: every process must make these calls, for all of them take part
# -------------------------------------------------


def unshard(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state dict, or any nesting of tensors, whole, in the main process's CPU memory; elsewhere None in each tensor's
    place.

    One tensor after the other: a device holds one whole tensor at a time.
    """
    is_main = process_state().is_main_process

    def collect(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        whole = unshard(leaf.detach())
        return whole.cpu() if is_main else None

    return tree_map(collect, state)


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole or sharded, as `parameter` is sharded, and on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
