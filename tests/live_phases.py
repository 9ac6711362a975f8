"""Live bytes of a training step, part by part: of the tests of the estimate, and of benchmarks/full_size.py."""

from contextlib import contextmanager

import torch

from flowbp.runtime.memory import Phases
from flowbp_kernels.offload import default_blocks, rebuilt


def plain(tensors):
    """What tensors are made of, which is several tensors for a quantised one."""
    found = []
    for tensor in tensors:
        rebuilt(tensor, lambda part: found.append(part) or part)
    return found


def at_home(model):
    """Bytes that `memory.offload` keeps off the device."""
    frozen = (t for block in default_blocks(model) for t in (*block.parameters(), *block.buffers()))
    return sum(t.nbytes for t in plain(t for t in frozen if not t.requires_grad))


def held(trainer):
    """Every tensor that a trainer keeps between steps."""
    backbone, rewards = trainer.model.backbone, [reward.model for reward in trainer.rewards.rewards.values()]
    for module in (backbone.denoiser, backbone.pipe.vae, *rewards):
        yield from plain((*module.parameters(), *module.buffers()))
    yield from trainer.model.masters.values()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield from trainer.model.ema.shadow_params if trainer.model.ema else ()


class LivePhases(Phases):
    """The most live bytes in each part of a step."""

    def __init__(self, live):
        super().__init__()
        self.live, self.peaks = live, {}

    @contextmanager
    def __call__(self, name):
        self.live.peak = self.live.alive
        with super().__call__(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0), self.live.peak)
