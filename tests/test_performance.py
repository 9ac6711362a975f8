"""Memory and speed switches: they change neither the gradient nor, tiling apart, the images."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from tiny_pipelines import tiny_pipeline

from flowbp.backbones import hasten
from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.config import ConfigError
from flowbp.config.schema import MemoryConfig, OptimizerConfig, TuningConfig
from flowbp.guidance import Guidance
from flowbp.methods import FlowBPBridge
from flowbp.replay import Recompute
from flowbp.runtime.memory import compile_blocks, peak_memory_mb, save_memory
from flowbp.runtime.tuning import build_optimizer, trainable_parameters
from flowbp.surrogate import backward, reward_input
from flowbp.trajectory import rollout

logging.set_verbosity_error()

SWITCHES = {
    "checkpointing": {"checkpointing": True},
    "vae": {"vae_checkpointing": True, "vae_slicing": True},
    "all": {"checkpointing": True, "vae_checkpointing": True, "vae_slicing": True, "compile": "eager"},
}


def tiny_backbone(name, dtype=torch.float32):
    return BACKBONES[name](tiny_pipeline(name).to(dtype), "float32", 48)


def step_gradient(name, compile=None, recompute=None, **switches):
    """The LoRA gradient of one step, and its images."""
    backbone = tiny_backbone(name)
    torch.manual_seed(0)
    parameters = trainable_parameters(backbone, TuningConfig(rank=2))
    for key, p in parameters.items():  # away from LoRA's zero, so that every parameter matters
        torch.nn.init.normal_(p, std=0.1) if "lora_B" in key else None
    save_memory(backbone, MemoryConfig(**switches))
    if compile is not None:
        compile_blocks(backbone.denoiser, compile)
    sigmas = backbone.sigmas(4, 64, 64)
    plan = FlowBPBridge(num_active=3, alpha=0.7).plan(sigmas.double().numpy(), np.random.default_rng(0))
    guidance = Guidance(embedded=3.5) if backbone.embeds_guidance else Guidance(3.0)
    velocity = bind_velocity(backbone, ["a red circle", "two blue stars"], guidance)
    noise = backbone.noise(64, 64, [torch.Generator().manual_seed(s) for s in (0, 1)])
    trajectory = rollout(velocity, noise, sigmas, plan, recompute=recompute)
    z = reward_input(plan, trajectory).requires_grad_()
    images = backbone.decode(z)
    (g,) = torch.autograd.grad(images.square().mean(), z)
    backward(plan, trajectory, velocity.replay, g)
    return torch.cat([p.grad.flatten() for p in parameters.values()]), images.detach()


plain = cache(step_gradient)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_gradient_stays_the_same(name, switches):
    torch._dynamo.reset()
    expected, pictures = plain(name)
    gradient, images = step_gradient(name, **switches)
    assert expected.norm() > 0 and (gradient - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(images, pictures, rtol=1e-4, atol=1e-4)


def test_graphs_of_compiled_blocks_can_be_weighed_and_kept():
    torch._dynamo.reset()
    expected, _ = plain("Flux2KleinPipeline")
    gradient, _ = step_gradient("Flux2KleinPipeline", "aot_eager", Recompute("auto", budget=10**9))
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", BACKBONES)
def test_checkpointing_keeps_fewer_activations(name):
    def saved(**switches):
        """Numbers that autograd keeps of the network and of the decoder."""
        backbone = tiny_backbone(name)
        backbone.denoiser.requires_grad_(True)
        save_memory(backbone, MemoryConfig(**switches))
        x, sizes = backbone.noise(64, 64, [torch.Generator().manual_seed(0)]), []
        velocity = bind_velocity(
            backbone, ["a red circle"], Guidance(embedded=3.5 if backbone.embeds_guidance else None)
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            v = velocity(x, torch.tensor(0.5))
            network = sum(sizes)
            backbone.decode(v)
        return np.array([network, sum(sizes) - network])

    assert (saved(checkpointing=True, vae_checkpointing=True) < 0.7 * saved()).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_tiling_is_differentiable(name):
    backbone = tiny_backbone(name, torch.float64)
    save_memory(backbone, MemoryConfig(vae_tiling=True, vae_checkpointing=True))
    vae = backbone.pipe.vae
    assert vae.use_tiling and not vae.use_slicing
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 32  # 3 x 3 tiles of a 64 x 64 image
    x = backbone.noise(64, 64, [torch.Generator().manual_seed(0)]).double()
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def score(x):
        image = vae.decode(backbone.vae_latents(x), return_dict=False)[0]  # not clamped as images are
        return (image * pixels).sum()

    (g,) = torch.autograd.grad(score(x.requires_grad_()), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slope = (score(x + 1e-6 * direction) - score(x - 1e-6 * direction)) / 2e-6
    assert slope.item() == pytest.approx((g * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_channels_last_changes_how_the_decoder_lies_in_memory_and_neither_images_nor_gradient(name):
    found, layouts = [], []
    for switch in (False, True):
        backbone = hasten(tiny_backbone(name), "off", channels_last=switch)
        backbone.pipe.vae.decoder.mid_block.register_forward_pre_hook(
            lambda _, given: layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
        x = backbone.noise(64, 64, [torch.Generator().manual_seed(s) for s in (0, 1)]).requires_grad_()
        images = backbone.decode(x)
        found.append((images.detach(), *torch.autograd.grad(images.square().sum(), x)))
    assert layouts == [False, True]
    for plain, other in zip(*found, strict=True):
        assert (other - plain).norm() <= 1e-5 * plain.norm()


def test_the_peak_of_a_process_is_in_megabytes_of_a_million_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "VmPeak:\t  9000 kB\nVmHWM:\t  5000 kB\nVmRSS:\t  400 kB\n")
    assert peak_memory_mb() == 5.12


@pytest.mark.parametrize("name", BACKBONES)
def test_lora_trains_in_float32_on_a_bfloat16_network(name):
    backbone = tiny_backbone(name, torch.bfloat16)
    parameters = trainable_parameters(backbone, TuningConfig(rank=2))
    assert {p.dtype for p in parameters.values()} == {torch.float32} and backbone.denoiser.dtype == torch.bfloat16
    velocity = bind_velocity(backbone, ["a red circle"], Guidance(embedded=3.5 if backbone.embeds_guidance else None))
    v = velocity(backbone.noise(64, 64, [torch.Generator().manual_seed(0)]), torch.tensor(0.5))
    v.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())


def test_the_8_bit_optimizer_names_its_package_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        build_optimizer([torch.zeros(2, requires_grad=True)], OptimizerConfig(name="adamw8bit"))


def test_the_8_bit_optimizer_gets_every_hyperparameter(monkeypatch):
    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    options = OptimizerConfig(name="adamw8bit", lr=1e-5, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    optimizer = build_optimizer([torch.zeros(2, requires_grad=True)], options)
    assert type(optimizer) is module.AdamW8bit
    assert all(optimizer.defaults[key] == getattr(options, key) for key in ("lr", "betas", "eps", "weight_decay"))
