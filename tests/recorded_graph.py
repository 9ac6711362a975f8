"""A stand-in for a CUDA graph: a closure over the buffers that it has recorded."""

import torch


class Recorder:
    """A capture on the CPU. As a graph, it computes nothing until it is replayed, always reads the memory that it was
    recorded with, and always writes the same.
    """

    def __init__(self):
        self.pools = []

    def __call__(self, forward, pool):
        self.pools.append(pool)
        output = torch.full_like(forward(), torch.nan)
        return lambda: output.copy_(forward()), output
