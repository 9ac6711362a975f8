"""Bytes of tensors, counted as they come and go."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on any device, the meta device too: of `existing`, and of all that a block makes.

    alive: bytes of the tensors that are alive now. peak: the most that were alive at once.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.alive, self.peak, self._seen = 0, 0, {}
        for tensor in existing:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):  # its parts are counted
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen and size > 0:
            self._seen[key] = weakref.finalize(storage, self._release, key, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _release(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.alive -= size
