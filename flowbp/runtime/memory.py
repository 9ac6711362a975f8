"""Memory against speed: diffusers' own switches on a backbone, blocks that come and go, and how memory and time are
measured.

diffusers' group offload is not among the switches. It takes a block's weights away after each forward pass, but a
backward pass reads them; `flowbp_kernels.offload_blocks` brings them back.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin

from flowbp.backbones.base import Backbone
from flowbp.config.schema import MemoryConfig
from flowbp.replay import proc_bytes
from flowbp.runtime.embeddings import text_encoders
from flowbp_kernels import offload_blocks


def save_memory(backbone: Backbone, config: MemoryConfig) -> None:
    """Turn on what `config` asks for, on the transformer and the VAE."""
    denoiser, vae = backbone.denoiser, backbone.pipe.vae
    if config.checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.vae_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tiling:
        vae.enable_tiling()


def offload(backbone: Backbone, device: torch.device | str) -> None:
    """Let the blocks of the transformer, and of the text encoders that are left, live in CPU memory and visit `device`.
    The rest of these networks moves there. The pipeline moves after this, and leaves the blocks at home.
    """
    for network in (backbone.denoiser, *text_encoders(backbone).values()):
        offload_blocks(network, device)


def compile_blocks(denoiser: ModelMixin, backend: str) -> None:
    """Compile each kind of block once (regional compilation). Adapters must be in place before."""
    if not denoiser._repeated_blocks:  # diffusers names them for every class but SD3
        denoiser._repeated_blocks = ["JointTransformerBlock"]
    torch._dynamo.config.recompile_limit = 64  # graphs with gradient and without, of other batches, without the adapter
    denoiser.compile_repeated_blocks(backend=backend)


class Phases:
    """Seconds of the named parts of a step. Repeated parts add up.

    with phases("rollout"):
        ...
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - began


def now() -> float:
    """Seconds on a clock that waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_mb() -> float:
    """Peak memory so far in MB (1e6 bytes): the GPU's allocated bytes, or the process's resident set without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return proc_bytes("self/status", "VmHWM") / 1e6


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may take: of a GPU all that others leave, of a machine's memory its share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
