"""Noise levels: the published ones, linspace(1, 1 / N, N) under each pipeline's shift, and the sampler's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.guidance import Guidance

RULES = json.loads((Path(__file__).parents[1] / "golden" / "sampling_rules.json").read_text())
SD3 = "StableDiffusion3Pipeline"


def linear_mu(tokens, num_steps):
    """.5 at 256 image tokens, 1.15 at 4,096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def empirical_mu(tokens, num_steps):
    """FLUX.2: linear in the tokens at 10 and at 200 steps, and linear in the steps between the two."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_10 + (at_200 - at_10) * (num_steps - 10) / 190


MU = {"FluxPipeline": linear_mu, "Flux2KleinPipeline": empirical_mu, "ZImagePipeline": linear_mu}


@pytest.mark.parametrize("num_steps", [1, 12, 25])
@pytest.mark.parametrize("name", BACKBONES)
def test_training_levels_are_the_published_rule(tiny_backbone, name, num_steps):
    height, width = 96, 64
    u = 1 - np.arange(num_steps) / num_steps
    if name in MU:
        grown = np.exp(MU[name](height // 16 * width // 16, num_steps))
        expected = grown / (grown + 1 / u - 1)
    else:
        expected = 3 * u / (1 + 2 * u)  # the tiny pipeline's shift is that of SD3.5
    levels = tiny_backbone(name).sigmas(num_steps, height, width)
    assert levels.dtype == torch.float32
    np.testing.assert_allclose(levels.numpy(), [*expected, 0.0], rtol=2e-6)


@pytest.mark.parametrize("num_steps", RULES["sigmas_shift3"])
def test_sd3_levels_are_those_of_the_released_trainer(tiny_backbone, num_steps):
    """To the last bit: the golden file holds what its scheduler computed."""
    assert tiny_backbone(SD3).sigmas(int(num_steps), 64, 64).tolist() == RULES["sigmas_shift3"][num_steps]


def test_the_sd3_sampler_ends_next_to_zero_and_the_published_levels_do_not(tiny_backbone):
    published, sampler = (tiny_backbone(SD3).sigmas(25, 64, 64, levels) for levels in ("published", "pipeline"))
    assert published[-2].item() == pytest.approx(1 / 9) and sampler[-2].item() == pytest.approx(0.0089, abs=1e-4)


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {SD3}))
def test_the_other_samplers_take_the_published_levels(tiny_backbone, name):
    backbone = tiny_backbone(name)
    published, sampler = (backbone.sigmas(25, 64, 64, levels) for levels in ("published", "pipeline"))
    torch.testing.assert_close(published, sampler, rtol=1e-6, atol=0)


def test_the_embedded_model_has_the_shift_of_its_scheduler():
    u = 1 - torch.arange(12) / 12
    levels = load_backbone("shapes", max_sequence_length=1).sigmas(12, 32, 32)
    torch.testing.assert_close(levels, torch.cat([2 * u / (1 + u), torch.zeros(1)]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_timesteps_told_in_bfloat16_are_the_rounded_ones(name):
    """1000 sigma = 986.3 is 988 in bfloat16."""
    backbone = BACKBONES[name](tiny_pipeline(name), max_sequence_length=48)
    guidance = Guidance(embedded=3.5 if backbone.embeds_guidance else None)
    exact, rounded = (bind_velocity(backbone, ["a"], guidance, dtype) for dtype in ("float32", "bfloat16"))
    x, sigma = backbone.noise(64, 64, [torch.Generator().manual_seed(0)]), torch.tensor(0.9863)
    with torch.no_grad():
        torch.testing.assert_close(rounded(x, sigma), exact(x, torch.tensor(0.988)))
        assert not torch.allclose(rounded(x, sigma), exact(x, sigma))
