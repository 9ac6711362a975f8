"""A stand-in for a CUDA graph: a closure over the buffers that it has recorded."""

import torch


class Recorder:
    """A capture on the CPU. As a graph, it computes nothing until it is replayed, reads the arguments from the memory
    that it was recorded with, and writes its result into the same. A graph would not see weights that were replaced
    rather than changed in place; this stand-in does.
    """

    def __init__(self):
        self.pools = []

    def __call__(self, forward, pool):
        self.pools.append(pool)
        output = torch.full_like(forward(), torch.nan)
        return lambda: output.copy_(forward()), output
