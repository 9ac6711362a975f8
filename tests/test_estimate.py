"""The predicted memory of a step against what a step takes, counted in live bytes on tiny models."""

import gc
import json

import pytest
import torch
from typer.testing import CliRunner

from flowbp.backbones.tiny import tiny_pipeline
from flowbp.cli import app
from flowbp.config import load
from flowbp.estimate import estimate, network_pass, parse_size, suggest
from flowbp.performance import LiveBytes
from flowbp.trainer import Trainer


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Overrides by pipeline class: tiny random pipelines at a size where activations are most of the memory."""
    folder, found = tmp_path_factory.mktemp("pipelines"), {}
    for name, guidance in (("StableDiffusion3Pipeline", "scale=3.0"), ("FluxPipeline", "embedded=3.5"), ("Flux2KleinPipeline", "scale=2.0")):
        tiny_pipeline(name).save_pretrained(folder / name)
        found[name] = [f"backbone.name={folder / name}", "backbone.max_sequence_length=48", f"guidance.{guidance}"]
    return found


def tiny(tmp_path, *overrides):
    sizes = ["rollout.height=128", "rollout.width=128", "data.batch_size=4", "rollout.num_steps=12", "steps=2", "evaluation=null"]
    return load("demo", [f"output={tmp_path / 'run'}", *sizes, *overrides])


def held(trainer):
    """Every tensor that a trainer keeps between steps."""
    for module in (trainer.backbone.denoiser, trainer.backbone.pipe.vae, *(reward.model for reward in trainer.mixture.rewards.values())):
        yield from module.parameters()
        yield from module.buffers()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield from trainer.ema.shadow_params if trainer.ema else ()


def measured_peak(config):
    trainer = Trainer(config)
    trainer.optimizer.param_groups[0]["foreach"] = True  # as on a GPU
    trainer.step(0)  # the moments are made
    gc.collect()
    with LiveBytes(held(trainer)) as live:
        trainer.step(1)
    return live.peak, trainer


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("StableDiffusion3Pipeline", []),
        ("StableDiffusion3Pipeline", ["memory.checkpointing=true", "memory.vae_checkpointing=true"]),
        ("StableDiffusion3Pipeline", ["tuning.mode=full", "memory.reward_batch=1", "data.accumulate=2"]),
        ("FluxPipeline", ["memory.reward_batch=1"]),
        ("FluxPipeline", ["memory.reward_batch=1", "memory.recompute=never"]),
        ("FluxPipeline", ["memory.reward_batch=1", "tuning.mode=full", "memory.checkpointing=true"]),
        ("Flux2KleinPipeline", ["memory.reward_batch=1", "method={name: flowbp-sparse, num_active: 4}", "memory.nodes_per_forward=2"]),
        ("Flux2KleinPipeline", ["memory.reward_batch=1", "tuning.mode=full", "memory.recompute=never", "ema=null"]),
    ],
)
def test_the_peak_is_predicted_within_15_percent(name, overrides, backbones, tmp_path, capsys):
    config = tiny(tmp_path, *backbones[name], *overrides)
    predicted, (measured, trainer) = estimate(config), measured_peak(config)
    with capsys.disabled():
        print(f"\n{name} {' '.join(overrides)}: {predicted.peak / measured:.3f} of {measured / 1e6:.2f} MB, in the {predicted.peak_phase}")
    assert predicted.peak == pytest.approx(measured, rel=0.15)
    assert predicted.trained == sum(p.numel() for p in trainer.parameters.values())
    frozen = sum(p.numel() for p in trainer.backbone.denoiser.parameters()) - (predicted.trained if config.tuning.mode == "lora" else 0)
    assert predicted.parameters == frozen
