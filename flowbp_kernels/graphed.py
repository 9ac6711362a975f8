"""A forward pass without gradient as a CUDA graph: its launches are recorded once and then sent to the GPU as one.

At batch 1 or 2 a GPU finishes the kernels of a transformer sooner than Python launches them. A graph replays the same
kernels on the same memory. So the arguments are copied into buffers that stay, and the result is copied out of one.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowbp_kernels.sweep import RngState

Forward = Callable[[], Tensor]
WARM_UP = 3  # passes before a capture, in which libraries choose kernels and take memory; torch asks for as many


def cuda_graph(forward: Forward, pool: Any) -> tuple[Callable[[], object], Tensor]:
    """(replay, output): replay() runs the kernels that forward() launched, and writes its result into `output`.

    pool: of memory, from torch.cuda.graph_pool_handle().
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            forward()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Threads of other libraries, such as NCCL's, may ask for events meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = forward()
    return graph.replay, output


class GraphedForward:
    """function(*arguments) -> tensor, replayed as a CUDA graph: one for each structure, shape, dtype and device of the
    arguments.

    function: its arguments may hold tensors in tuples, lists and dicts. It must not synchronise with the CPU, nor take
        a shape from the values of a tensor, and draws no random numbers. Weights may change in place between calls.
        Call `forget` after anything else that changes what it computes: weights that are replaced or moved, an adapter
        that is switched off.
    capture, device_type: what records a graph, of tensors on which type of device.

    `function` itself runs with gradient enabled, under autocast, which keeps casts of weights from earlier passes, and
    where a tensor is elsewhere, so that without CUDA there are no graphs. Graphs share their memory and keep it until
    `forget`: about that of the largest pass.
    The result is a copy, so that a later call does not change it.
    Raises ValueError for a function that cannot be captured or that draws random numbers, and for arguments that are
    neither tensors nor numbers, texts or None.

        velocity = GraphedForward(backbone.velocity)
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        capture: Callable[[Forward, Any], tuple[Callable[[], object], Tensor]] = cuda_graph,
        device_type: str = "cuda",
    ):
        self.__wrapped__ = function
        self._capture, self._device_type = capture, device_type
        self._name = getattr(function, "__qualname__", repr(function))
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        """A copy of the function, without graphs: those write into the original's memory."""
        return GraphedForward(copy.deepcopy(self.__wrapped__, memo), self._capture, self._device_type)

    def forget(self) -> None:
        """Drop all graphs; the next calls record new ones."""
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], object], Tensor]] = {}
        self._pool: Any = None

    def __call__(self, *arguments: Any) -> Tensor:
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        elsewhere = not tensors or any(t.device.type != self._device_type for t in tensors)
        if elsewhere or torch.is_grad_enabled() or torch.is_autocast_enabled(self._device_type):
            return self.__wrapped__(*arguments)
        if strange := [leaf for leaf in leaves if not isinstance(leaf, Tensor | bool | int | float | str | None)]:
            kind = type(strange[0]).__name__
            raise ValueError(f"{self._name} was given a {kind}: a CUDA graph is known by tensors, numbers and texts")
        kinds = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
        key = repr((structure, kinds, torch.is_inference_mode_enabled()))
        if key not in self._graphs:
            self._graphs[key] = self._record(leaves, structure, tensors[0].device)
        buffers, replay, output = self._graphs[key]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        replay()
        return output.clone()

    def _record(self, leaves: list[Any], structure: Any, device: torch.device) -> tuple:
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(held, structure)
        if self._pool is None and self._device_type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        before = RngState.capture(device)
        self.__wrapped__(*arguments)
        if RngState.capture(device) != before:
            before.restore()
            cause = "draws random numbers (dropout), and a CUDA graph would not repeat them"
            raise ValueError(f"{self._name} {cause}: put the network in eval()")
        try:
            replay, output = self._capture(lambda: self.__wrapped__(*arguments), self._pool)
        except RuntimeError as error:
            way_out = "call it without GraphedForward; in a run, set backbone.cuda_graph=false"
            raise ValueError(f"{self._name} cannot be captured as a CUDA graph ({error}): {way_out}") from error
        return [leaf for leaf in held if isinstance(leaf, Tensor)], replay, output
