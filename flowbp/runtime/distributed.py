"""Several processes, one gradient: which rows of the global batch a process trains, and how gradients are averaged.

A step runs many backward passes, and each adds to the process's own gradient. The gradients of all processes are
averaged once a step:

    with ranks.averaging():
        ...  # rollout, reward
        backward(plan, trajectory, velocity.replay, g, before_last=ranks.reduce_with)

If every process has a copy of the weights, the end of the block runs one all-reduce a parameter. A process then holds
the gradient that it would hold alone. DistributedDataParallel is not used, because it reduces its buckets in the first
backward pass unless it is told which pass is the last, and must know by then which parameters took part in all of them.

If the weights are sharded (FSDP2), the last backward pass reduces and splits the gradient, or, with
`memory.shard_gradients`, each of them does. With `memory.shard=node` the processes of a machine share one copy of the
weights, and every machine has a copy (a mesh of machines x processes). Gradients are split within a machine, and
averaged over machines in the last backward pass.

A block of sharded weights is gathered for every pass through it. A rollout changes no weight, so that one gathering is
enough for all of its calls:

    with ranks.gathering():
        ...  # rollout

Blocks stay gathered until the end of the block if `memory.gather` says so, and if memory holds the whole network.

Every process draws the plans of the whole batch from the same generator, so that all run equally many forward passes.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowbp.config.schema import MemoryConfig

if TYPE_CHECKING:  # importing it takes seconds, and whoever checks a command's input does without
    from diffusers import ModelMixin

    from flowbp.backbones.base import Backbone


def process_state() -> PartialState:
    """This process among those of the run. accelerate starts a process group on CPUs only with `cpu=True`."""
    return PartialState(cpu=not torch.accelerator.is_available())


def on_main(work: Callable[[], object]) -> None:
    """Let the main process do `work` while the others wait for it."""
    state = process_state()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


class Ranks:
    """The processes of a run, and the network that they share. Building it moves the pipeline to the device.

    With `memory.shard` the weights of the network's blocks are split over the processes (FSDP2). Blocks are moved to
    the device and split one by one, so that no device holds the whole network before the first rollout.

    gathers_once: whether a rollout gathers each block once. `memory.gather=auto` leaves it to who knows the memory.
    """

    def __init__(self, accelerator: Accelerator, backbone: "Backbone", memory: MemoryConfig):
        self.accelerator, self.size, self.rank = accelerator, accelerator.num_processes, accelerator.process_index
        self.shard_gradients, self.sharded = memory.shard_gradients, None
        self.gathers_once = memory.gather == "rollout"
        if self.size > 1 and memory.shard:
            within = self.size if memory.shard == "all" else int(os.environ.get("LOCAL_WORLD_SIZE", 0))
            if within < 1 or self.size % within:
                rule = f"needs as many processes on every machine: LOCAL_WORLD_SIZE is {within} of {self.size}"
                raise ValueError(f"memory.shard=node {rule}; start them by torchrun, or use memory.shard=all")
            self.sharded = shard_weights(backbone.denoiser, accelerator.device, within)
        # What is gathered at a time. The first is what belongs to no block: FSDP2 keeps it until a backward pass.
        self._parts = [] if self.sharded is None else [p for p in self.sharded.modules() if hasattr(p, "reshard")]
        backbone.pipe.to(accelerator.device)
        self.trained = [p for p in backbone.denoiser.parameters() if p.requires_grad]
        if self.size > 1 and not memory.shard:
            for p in self.trained:  # copies start equal
                torch.distributed.broadcast(p.detach(), 0)

    def rows(self, per_rank: int) -> slice:
        """This process's part of a global batch of size * per_rank rows."""
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """The block holds the backward passes of one optimizer step; its end averages .grad over the processes."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(self.shard_gradients)
            self.sharded.set_requires_all_reduce(False)  # over machines once, in the last pass
        yield
        if self.size > 1 and self.sharded is None:
            gradients = [p.grad.div_(self.size) for p in self.trained if p.grad is not None]
            for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]

    def reduce_with(self, v: Tensor) -> None:
        """To be called before the last backward pass of the step, that of `v`: it must reduce sharded gradients."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(True)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """The block holds forward passes with the same weights. With `gathers_once` each of the network's blocks is
        gathered in the first of them and kept. The end drops all that is gathered, so that weights may change.
        """
        for block in self._parts[1:]:
            block.set_reshard_after_forward(not self.gathers_once)
        yield
        for part in self._parts:
            part.set_reshard_after_forward(part is not self.sharded, recurse=False)
            part.reshard()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value averaged over the processes."""
        table = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        means: Any = self.accelerator.reduce(table, "mean")
        return dict(zip(values, means.tolist(), strict=True))


def shard_weights(denoiser: "ModelMixin", device: torch.device, within: int) -> Any:
    """Apply FSDP2 in place, on `device`: a transformer block's weights are gathered when it runs, and dropped after.

    Each `within` processes in a row split the weights, and each such group has a copy of them.

    Gradients are accumulated and reduced in float32 (or wider), as the released trainers do, and then rounded to the
    weights' dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(denoiser.dtype, torch.float32))
    copies = torch.distributed.get_world_size() // within
    shape, names = ((within,), ("shards",)) if copies == 1 else ((copies, within), ("copies", "shards"))
    options = {"mesh": init_device_mesh(device.type, shape, mesh_dim_names=names), "mp_policy": policy}
    for block in denoiser.modules():
        if type(block).__name__ in denoiser._no_split_modules:
            fully_shard(block, **options)
    return fully_shard(denoiser, **options)


# -- sharded tensors: all processes take part in these calls, so each of them must make them ---------------------------


def unshard(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state dict, or any nesting of tensors, whole, in the main process's CPU memory; elsewhere None for each tensor.

    Tensors are gathered one after the other, so that a device holds one whole tensor at a time.
    """
    is_main = process_state().is_main_process

    def collect(tensor: Tensor) -> Tensor | None:
        whole = unshard(tensor.detach())
        return whole.cpu() if is_main else None

    return tree_map_only(Tensor, collect, state)


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, which may be whole or sharded, with the sharding and on the device of `parameter`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
