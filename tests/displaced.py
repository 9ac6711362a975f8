"""Tensors that lie where another file, view or allocator might have put them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

OFFSETS = (4, 8, 12)  # bytes beyond a boundary of 16


class Displaced(TorchDispatchMode):
    """Within the block every operator reads its floating-point tensors `offset` bytes beyond a boundary of 16 bytes.

    Activations and weights alike: torch's own tensors start on 64 bytes, while a row of a view, or a weight in a mapped
    file, starts at any multiple of its element's size. What an operator changes, or returns a view of, stays where it
    is, as do elements whose size does not divide `offset`.
    """

    def __init__(self, offset: int):
        super().__init__()
        self.offset, self.moved = offset, 0

    def __enter__(self):
        self.moved = 0
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        assert self.moved or raised[0], "no operator of the block read a tensor"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "c10d":  # whose operators fill what they are given, and do not say so
            stay = {argument.name: argument.alias_info is not None for argument in function._schema.arguments}
            args = [
                value if here else tree_map(self.move, value) for here, value in zip(stay.values(), args, strict=False)
            ]
            kwargs = {name: value if stay[name] else tree_map(self.move, value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def move(self, value):
        """A copy of a tensor with its sizes and strides; anything else as it is."""
        if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point() or not value.numel():
            return value
        skipped, rest = divmod(self.offset, value.element_size())
        if rest:
            return value
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        storage = torch.empty(skipped + span, dtype=value.dtype)
        storage[skipped:] = value.as_strided((span,), (1,))
        moved = storage.as_strided(value.shape, value.stride(), skipped)
        assert moved.data_ptr() % 16 == self.offset
        self.moved += 1
        return moved


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within the block no weight requires a gradient: matmul rounds by whether one does, for it folds a batch by
    that.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
