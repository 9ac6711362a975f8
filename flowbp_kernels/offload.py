"""Blocks that come and go: frozen weights of a network's blocks live in CPU memory, and visit the device for as long as
their block runs or its graph lives.

An offload that takes weights away after forward serves no training, because backward reads them. Here gradient
checkpointing supplies the weights again. A block runs in forward without a graph. In backward it is computed once more,
on new copies of its weights. The graph of that recomputation holds the copies until the block's backward is done, and
no longer: reference counts free them. So a step never holds more than two blocks: the one that computes, and the one
that is fetched meanwhile.

On CUDA the copies are made on a stream of their own, from pinned memory:

    entering block i    the stream waits until all that was launched before i is done, and then copies block i + 1 (in a
                        recomputation i - 1), while i computes
    entering i + 1      its computation waits for the end of that copy

The first rule bounds the memory too. Copies are allocated and freed in the order of the computing stream, and a copy
into memory that an earlier block used waits for that block. `record_stream` would let the CPU run ahead of the GPU, and
each block that it launched would hold memory of its own.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

WATCHED = 64  # forward passes with gradient after which the check ends, where no block was computed again
PINNED = 2**30  # bytes of a piece of pinned memory: torch rounds each allocation of it up to a power of two


def offload_blocks(
    module: nn.Module, device: torch.device | str, blocks: Iterable[nn.Module] | None = None
) -> "Visits":
    """Let the frozen weights of `blocks` live in CPU memory and visit `device`; move all else of `module` to it.

    device: where the module computes. If the weights are there already (CPU on CPU, meta on meta), they are copied all
    the same, so that a test or an estimate can count the copies. From a GPU the weights go home to the CPU.
    blocks: the modules that visit; each must be called as a module (`block(x)`), and none may hold another. None means
    the elements of the outermost nn.ModuleLists of `module`, such as transformer_blocks, or T5's encoder.block.

    A weight or buffer is frozen if it does not require grad now. What is trained stays on the device, and so does what
    lies outside of the blocks. So add LoRA adapters before. Frozen weights travel one way: what a forward pass writes
    into a buffer is lost. Tensor subclasses visit too: torchao's, and the 4-bit weights of bitsandbytes.
    `module.to(device)` leaves frozen weights of blocks at home; a change of dtype raises ValueError. Forwards that
    `flowbp_kernels.apply` sets, before or after, work as before.

    Forward passes without gradient need nothing else. Those with one need gradient checkpointing around each block
    (torch.utils.checkpoint, diffusers' enable_gradient_checkpointing), or their graph keeps the copies of all blocks.

    Memory: two blocks on the device. Copies: each block once a forward pass, and once more in its backward pass.
    The gradient is the same, bit for bit. A copy that came too late would change it without an error. So the first
    backward passes compare: each block's output in the recomputation must have the checksum that it had in the forward
    pass. This needs calls of `module` itself and non-reentrant checkpointing. It ends with the next forward pass with
    gradient, and costs two reads of each output and one synchronisation a block.

    Raises ValueError where there is no block or nothing frozen in one, for blocks within each other, a block that is
    compiled, sharded weights (FSDP2) and 8-bit layers of bitsandbytes. A forward pass raises it where a frozen weight
    was replaced or set to require grad since. Backward raises RuntimeError where a recomputation gave other bits.

        transformer.enable_gradient_checkpointing()
        handle = flowbp_kernels.offload_blocks(transformer, "cuda")
    """
    return Visits(module, torch.device(device), blocks)


def default_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost ModuleLists of `module`. In place of an element that is a list itself, its own."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from default_blocks(child)


class Visits:
    """What `offload_blocks` attached to a module: who visits, in which order, and who is fetched ahead."""

    def __init__(self, module: nn.Module, device: torch.device, blocks: Iterable[nn.Module] | None):
        chosen = list(default_blocks(module) if blocks is None else blocks)
        names = {part: name for name, part in module.named_modules()}
        _check(module, chosen, names)
        self.device = device
        self.order: list[_Visitor] = []  # as the first forward pass ran them
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[_Visitor, list[Tensor], Any] | None = None  # fetched before it is due: copies, their event
        self._passes: list[Any] = []  # a context for each call of the module that runs now
        self.watching, self._compared = device.type != "meta", False
        home = _Pinned() if device.type == "cuda" else None
        self._visitors = [_Visitor(self, names.get(block, type(block).__name__), block, home) for block in chosen]
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]
        nn.Module.to(module, device)

    def undo(self) -> None:
        """Take all hooks off. The frozen weights of the blocks stay on the CPU: move them with `module.to(device)`."""
        self._drop_ahead()
        for visitor in self._visitors:
            visitor.undo()
        for hook in self._hooks:
            hook.remove()
        self._visitors, self._hooks = [], []

    def __reduce__(self):
        raise ValueError("a module with offloaded blocks cannot be copied or pickled: call undo() of the handle first")

    # -- coming and going ----------------------------------------------------------------------------------------------

    def enter(self, visitor: "_Visitor") -> None:
        """The block of `visitor` is about to run: copies take the place of its weights. A neighbour is fetched."""
        if visitor not in self.order:
            self.order.append(visitor)
        visitor.swap(self._copies(visitor))
        position = self.order.index(visitor) + (-1 if self.recomputing else 1)
        if 0 <= position < len(self.order):
            self._ahead = (self.order[position], *self._fetch(self.order[position]))

    @property
    def recomputing(self) -> bool:
        """Whether this is a block's recomputation. A whole forward pass may run in backward too (selective_recompute),
        but checkpointing calls the blocks alone.
        """
        return not self._passes and torch._C._current_graph_task_id() != -1

    def _copies(self, visitor: "_Visitor") -> list[Tensor]:
        """The copies of `visitor`, ready for the computing stream."""
        if self._ahead is None or self._ahead[0] is not visitor:
            self._drop_ahead()  # before the others come: there are never three
            self._ahead = (visitor, *self._fetch(visitor))
        _, copies, _ = self._ahead
        self._drop_ahead()
        return copies

    def _drop_ahead(self) -> None:
        """Forget what was fetched ahead. Its memory is used or given away from here on, so the copy must be done."""
        if self._ahead is not None and self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ahead[2])
        self._ahead = None

    def _fetch(self, visitor: "_Visitor") -> tuple[list[Tensor], Any]:
        """(a copy on the device of each home, the event of the last copy; None without streams)."""
        made: dict[int, Tensor] = {}  # a tensor that has two names is copied once
        copying: list[tuple[Tensor, Tensor]] = []

        def twin(home: Tensor) -> Tensor:
            copying.append((torch.empty_like(home, device=self.device), home))
            return copying[-1][0]

        with torch.no_grad():
            for _, _, home in visitor.homes:
                if id(home) not in made:
                    made[id(home)] = rebuilt(home, twin)
            event = None
            if self.side is not None:
                self.side.wait_stream(torch.cuda.current_stream(self.device))
            with nullcontext() if self.side is None else torch.cuda.stream(self.side):
                for target, source in copying:
                    target.copy_(source, non_blocking=True)
            if self.side is not None:
                event = self.side.record_event()
        return [made[id(home)] for _, _, home in visitor.homes], event

    # -- the check that a recomputation repeats its forward pass -------------------------------------------------------

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        """The module is called. Checkpointing would stop a recomputation before its output, unless told not to here."""
        if self._passes:  # a KeyboardInterrupt ended the last call: PyTorch calls the hooks below for errors alone
            self._end(module, arguments, None)
            for visitor in self._visitors:
                visitor.swap([home for _, _, home in visitor.homes])
        most = max((len(visitor.checksums) for visitor in self._visitors), default=0)
        if torch.is_grad_enabled() and (self._compared or most >= WATCHED):
            self.watching = False
            for visitor in self._visitors:
                visitor.checksums.clear()
        watched = self.watching and torch.is_grad_enabled()
        self._passes.append(set_checkpoint_early_stop(False) if watched else nullcontext())
        self._passes[-1].__enter__()

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._passes:  # empty where another hook's error came before _begin
            self._passes.pop().__exit__(None, None, None)

    def leave(self, visitor: "_Visitor", output: Any) -> None:
        """The block of `visitor` has run, or was stopped: then there is no output."""
        visitor.swap([home for _, _, home in visitor.homes])
        if not self.watching or output is None or not torch.is_grad_enabled():
            return
        if self._passes:
            visitor.checksums.append(checksum(output))
        elif self.recomputing and visitor.checksums:
            self._compared = True
            if not (torch.stack(visitor.checksums) == checksum(output)).any():
                raise RuntimeError(
                    f"the recomputation of {visitor.name} in backward gave other bits than its forward pass, so the "
                    "gradient would be wrong. Its weights were changed in between or came too late, or an operation in "
                    "it does not repeat its bits: set torch.use_deterministic_algorithms(True), or do not offload"
                )


class _Visitor:
    """A block: where its frozen tensors hang, and the tensors themselves at home."""

    def __init__(self, visits: Visits, name: str, block: nn.Module, home: Callable[[Tensor], Tensor] | None):
        self.visits, self.name, self.block = visits, name, block
        self.checksums: list[Tensor] = []  # of the output, in forward passes with gradient that are watched
        self.homes: list[tuple[dict[str, Any], str, Tensor]] = []  # (table of a module, name in it, tensor)
        at_home: dict[int, Tensor] = {}
        for part in block.modules():
            for table in (part._parameters, part._buffers):
                for key, tensor in table.items():
                    if tensor is not None and not tensor.requires_grad:
                        if id(tensor) not in at_home:
                            stays = home is None and tensor.device.type in ("cpu", "meta")
                            at_home[id(tensor)] = tensor if stays else rebuilt(tensor, home or Tensor.cpu)
                        self.homes.append((table, key, at_home[id(tensor)]))
        self.swap([tensor for _, _, tensor in self.homes])
        self._hooks = [
            block.register_forward_pre_hook(lambda *_: self._come()),
            block.register_forward_hook(lambda _, arguments, output: visits.leave(self, output), always_call=True),
        ]
        block._apply = self._apply

    def _come(self) -> None:
        if any(table[key] is not home for table, key, home in self.homes):
            raise ValueError(
                f"a weight of {self.name} was replaced while its block was offloaded, and the new one would not visit: "
                "copy into it in place, or call undo() of the handle first, and offload_blocks again"
            )
        if any(home.requires_grad for _, _, home in self.homes):
            raise ValueError(
                f"a weight of {self.name} was frozen when its block was offloaded, and requires grad now. It would get "
                "no gradient: call undo() of the handle, and offload_blocks again"
            )
        self.visits.enter(self)

    def swap(self, tensors: list[Any]) -> None:
        """Hang `tensors` where the frozen ones are looked up."""
        for (table, key, _), tensor in zip(self.homes, tensors, strict=True):
            table[key] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """In place of the block's own: `module.to` and its kin move what is trained, and nothing that lives at home."""
        for dtype in {home.dtype for _, _, home in self.homes}:
            if (new := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                way_out = "call undo() of the handle, and offload_blocks again after the cast"
                raise ValueError(f"weights of {self.name} are offloaded and stay {dtype}, not {new}: {way_out}")
        self.swap([None] * len(self.homes))
        try:
            return type(self.block)._apply(self.block, fn, recurse)
        finally:
            self.swap([home for _, _, home in self.homes])

    def undo(self) -> None:
        for hook in self._hooks:
            hook.remove()
        del self.block._apply

    __reduce__ = Visits.__reduce__


def _check(module: nn.Module, blocks: list[nn.Module], names: dict[nn.Module, str]) -> None:
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no nn.ModuleList: name the modules that visit with blocks=")
    inner = {part for block in blocks for part in block.modules() if part is not block}
    dtensor = sys.modules.get("torch.distributed.tensor")  # loaded wherever a DTensor exists
    for block in blocks:
        name = f"{names.get(block, '')} ({type(block).__name__})"
        if block in inner or blocks.count(block) > 1:
            raise ValueError(f"{name} is named twice, or lies in another of the blocks: its weights would visit twice")
        if "_apply" in vars(block):
            raise ValueError(f"{name} is offloaded already: call undo() of its handle first")
        if block._compiled_call_impl is not None:
            raise ValueError(f"{name} is compiled, and its graph would hold the weights: offload without torch.compile")
        for tensor in (*block.parameters(), *block.buffers()):
            if dtensor is not None and isinstance(tensor, dtensor.DTensor):
                raise ValueError(f"the weights of {name} are sharded (DTensor, FSDP2): shard them, or offload them")
            if type(tensor).__name__ == "Int8Params":
                kept = "the 8-bit layers of bitsandbytes keep copies outside of their parameters"
                raise ValueError(f"{name}: {kept}: use its 4-bit layers, or torchao's int8")
    if all(p.requires_grad for block in blocks for p in (*block.parameters(), *block.buffers())):
        raise ValueError(f"no weight in the {len(blocks)} blocks of {type(module).__name__} is frozen: none can visit")


# -- tensors -----------------------------------------------------------------------------------------------------------


def rebuilt(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` with `function` applied to each plain tensor that it is made of; a frozen parameter stays one."""
    state = getattr(tensor, "quant_state", None)
    if is_traceable_wrapper_subclass(tensor):  # torchao
        names, context = tensor.__tensor_flatten__()
        parts = {name: rebuilt(getattr(tensor, name), function) for name in names}
        new = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    elif state is not None:  # bitsandbytes' Params4bit, whose own `to` would move the state of the original
        with torch._C.DisableTorchFunctionSubclass():
            new = torch.Tensor._make_subclass(type(tensor), function(tensor.detach().as_subclass(Tensor)), False)
        vars(new).update(vars(tensor), quant_state=_rebuilt_state(state, function))
        return new
    else:
        new = function(tensor.detach())
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _rebuilt_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A QuantState of bitsandbytes: tensors, numbers, and the state of a second quantisation."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(new, name, function(value))
        elif name == "state2" and value is not None:
            setattr(new, name, _rebuilt_state(value, function))
    return new


class _Pinned:
    """Copies tensors into pinned memory, one behind the other in pieces of PINNED bytes."""

    def __init__(self, pin: bool = True):
        self.pin, self.piece, self.used = pin, torch.empty(0, dtype=torch.uint8), 0

    def __call__(self, tensor: Tensor) -> Tensor:
        size, like = tensor.nbytes, torch.empty_like(tensor, device="meta")  # whose strides leave no holes
        if self.used + size > len(self.piece):
            self.piece, self.used = torch.empty(max(PINNED, size), dtype=torch.uint8, pin_memory=self.pin), 0
        flat = self.piece[self.used : self.used + size].view(tensor.dtype)
        self.used += -(-size // 64) * 64
        return flat.as_strided(like.shape, like.stride(), flat.storage_offset()).copy_(tensor)


def checksum(output: Any) -> Tensor:
    """[] int64: the sum, modulo 2^64, of the bits of all tensors in `output`, eight bytes at a time."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    with torch.no_grad():
        for tensor in tensors:
            bits = tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
            whole = len(bits) // 8 * 8
            total += bits[:whole].view(torch.int64).sum() + bits[whole:].sum()
    return total
