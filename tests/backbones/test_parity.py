"""Every backbone draws what its pipeline draws: bit for bit in a plain Euler loop, to rounding through the fused
ops.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import tiny_pipeline

from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.trajectory import rollout

SD3, FLUX, FLUX2, ZIMAGE = "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline"
TEXTS = ["a red circle", "two blue stars, far apart"]


@dataclass(frozen=True)
class Variant:
    """A class, and the same guidance in the pipeline's words and in ours."""

    name: str
    options: dict
    guidance: Guidance
    distilled: bool = False


VARIANTS = {
    "sd3": Variant(SD3, {"guidance_scale": 1.0}, Guidance()),
    "sd3 guided": Variant(SD3, {"guidance_scale": 4.5}, Guidance(4.5)),
    "flux.1": Variant(FLUX, {"guidance_scale": 3.5}, Guidance(embedded=3.5)),
    "flux.1 guided": Variant(
        FLUX, {"guidance_scale": 3.5, "true_cfg_scale": 2.5, "negative_prompt": ["", ""]}, Guidance(2.5, embedded=3.5)
    ),
    "flux.2 guided": Variant(FLUX2, {"guidance_scale": 4.0}, Guidance(4.0)),
    "flux.2 distilled": Variant(FLUX2, {"guidance_scale": 4.0}, Guidance(), distilled=True),
    "z-image": Variant(ZIMAGE, {"guidance_scale": 0.0}, Guidance()),
    "z-image guided": Variant(ZIMAGE, {"guidance_scale": 3.0}, Guidance(4.0)),
}


def seeds():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def spatial(pipe, latents, height, width):
    """The pipeline's latents in the shape of ours."""
    if latents.dim() == 4:
        return latents
    if type(pipe).__name__ == FLUX:
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    return latents.mT.unflatten(2, (height // 16, width // 16))


@torch.no_grad()
def drawn_by_pipeline(backbone, variant, steps, height, width):
    """(the latents after each step, the images)"""
    trajectory, pipe = [], backbone.pipe

    def keep(pipe, step, timestep, tensors):
        trajectory.append(spatial(pipe, tensors["latents"], height, width))
        return {}

    images = pipe(
        prompt=list(TEXTS), height=height, width=width, num_inference_steps=steps, generator=seeds(), output_type="pt",
        callback_on_step_end=keep, **backbone.text_options, **variant.options,
    ).images  # fmt: skip
    return trajectory, images.float()


@torch.no_grad()
def drawn_by_euler(backbone, variant, steps, height, width, sigmas=None):
    """The same by plain Euler steps."""
    embedded = {} if variant.guidance.embedded is None else {"guidance": torch.full((2,), variant.guidance.embedded)}
    # Both of one batch size, by which the embeddings round.
    positive, negative = (backbone.encode(texts) | embedded for texts in (TEXTS, ["", ""]))
    velocity = GuidedVelocity(
        backbone.velocity, positive, negative, variant.guidance, backbone.guidance_branches == "batched"
    )
    x = backbone.noise(height, width, seeds())
    sigmas = backbone.sigmas(steps, height, width, "pipeline") if sigmas is None else sigmas
    trajectory = []
    for sigma, h in zip(sigmas, torch.diff(sigmas), strict=False):
        v = velocity(x, sigma)
        if variant.name == ZIMAGE and variant.guidance.active:
            # The same guidance, in the order in which this pipeline rounds it, and like it in float32.
            positive, negative = (branch.float() for branch in velocity.branches(x, sigma))
            v = positive + (variant.guidance.scale - 1) * (positive - negative)
        x = (x.float() + h * v.to(x.dtype)).to(x.dtype)
        trajectory.append(x)
    return trajectory, backbone.decode(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_latents_and_images_are_the_pipelines_own(tiny_backbone, variant, dtype):
    backbone = tiny_backbone(variant.name, dtype, "pipeline", variant.distilled)
    for size, steps in (((64, 64), 14), ((96, 64), 4)):
        expected, pictures = drawn_by_pipeline(backbone, variant, steps, *size)
        trajectory, images = drawn_by_euler(backbone, variant, steps, *size)
        assert len(trajectory) == len(expected) == steps
        for ours, theirs in zip(trajectory, expected, strict=True):
            assert ours.dtype == backbone.latents_dtype and torch.equal(ours, theirs), f"{size}, {steps} steps"
        assert torch.equal(images, pictures) and images.std() > 0.1


def test_an_sd3_scheduler_may_shift_by_resolution():
    pipe = tiny_pipeline(SD3)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    backbone = BACKBONES[SD3](pipe)
    (*_, expected), _ = drawn_by_pipeline(backbone, VARIANTS["sd3"], 4, 96, 64)
    (*_, sample), _ = drawn_by_euler(backbone, VARIANTS["sd3"], 4, 96, 64)
    assert torch.equal(sample, expected)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_fused_rollout_is_the_pipelines_to_rounding(tiny_backbone, variant):
    backbone = tiny_backbone(variant.name, torch.float32, "pipeline", variant.distilled)
    (*_, expected), _ = drawn_by_pipeline(backbone, variant, 4, 96, 64)
    velocity = bind_velocity(backbone, TEXTS, variant.guidance)
    sample = rollout(velocity, backbone.noise(96, 64, seeds()), backbone.sigmas(4, 96, 64, "pipeline")).sample
    assert (sample - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_bfloat16_rollout_is_no_further_from_float64_than_the_pipeline(tiny_backbone, variant):
    """All three start from the same noise and the same embeddings and run the same bfloat16 weights."""
    backbone = tiny_backbone(variant.name, torch.bfloat16, "pipeline", variant.distilled)
    (*_, pipelines), _ = drawn_by_pipeline(backbone, variant, 4, 96, 64)
    velocity, noise = bind_velocity(backbone, TEXTS, variant.guidance), backbone.noise(96, 64, seeds())

    exact = BACKBONES[variant.name](copy.deepcopy(backbone.pipe).to(torch.float64), "pipeline")
    exact.encode = lambda texts: {
        key: v.double() if v.is_floating_point() else v for key, v in backbone.encode(texts).items()
    }
    sigmas = backbone.sigmas(4, 96, 64, "pipeline")
    truth = rollout(bind_velocity(exact, TEXTS, variant.guidance), noise.double(), sigmas).sample
    errors = {
        name: (sample.double() - truth).norm().item()
        for name, sample in {
            "pipeline": pipelines,
            "rollout": rollout(velocity, noise, sigmas).sample,
            "float32 latents": rollout(velocity, noise.float(), sigmas).sample,
        }.items()
    }
    assert truth.dtype == torch.float64
    assert max(errors["rollout"], errors["float32 latents"]) <= 1.1 * errors["pipeline"]  # 10 %: rounding is random


# -- an adapter that is wrong in one respect draws something else ------------------------------------------------------

LEVELS = torch.linspace(1, 1 / 8, 8)


def ended(levels):
    return torch.cat([levels, torch.zeros(1)])


def shifted(levels, shift=3.0):
    return shift * levels / (1 + (shift - 1) * levels)


def with_mu(mu):
    return ended(torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + 1 / LEVELS - 1))


def scaled(name, factor):
    return lambda inputs: inputs | {name: inputs[name] * factor}


def swap_halves(tensor):
    return tensor.roll(len(tensor) // 2, 0)


def transposed(ids):
    """Row and column swapped: columns 1 and 2 of the ids, of 3 (FLUX.1) or 4 (FLUX.2)."""
    order = [0, 2, 1, 3][: ids.shape[-1]]
    return ids[..., order]


# name: (variant, wrong inputs of the network, wrong sigmas)
WRONG = {
    "sd3: timestep in sigma units": ("sd3 guided", scaled("timestep", 1e-3), None),
    "sd3: levels linspace(1, 1/n), shifted once": ("sd3 guided", None, ended(shifted(LEVELS))),
    "sd3: levels linspace(1, .001), shifted once": ("sd3 guided", None, ended(shifted(torch.linspace(1, 1e-3, 8)))),
    "sd3: levels not shifted": ("sd3 guided", None, ended(LEVELS)),
    "sd3: branches swapped": (
        "sd3 guided",
        lambda i: i | {key: swap_halves(i[key]) for key in ("encoder_hidden_states", "pooled_projections")},
        None,
    ),
    "sd3: pooled text left out": ("sd3 guided", scaled("pooled_projections", 0), None),
    "sd3: another negative prompt": (
        "sd3 guided",
        lambda i: (
            i
            | {
                "encoder_hidden_states": torch.cat(
                    [i["encoder_hidden_states"][2:].flip(0), i["encoder_hidden_states"][2:]]
                )
            }
        ),
        None,
    ),
    "flux.1: timestep times 1000 twice": ("flux.1", scaled("timestep", 1000), None),
    "flux.1: guidance left at 1": ("flux.1", lambda i: i | {"guidance": torch.ones(2)}, None),
    "flux.1: rows and columns swapped": ("flux.1", lambda i: i | {"img_ids": transposed(i["img_ids"])}, None),
    "flux.1: positions left out": ("flux.1", scaled("img_ids", 0), None),
    "flux.1: static shift": ("flux.1", None, ended(shifted(LEVELS))),
    "flux.1: pooled text left out": ("flux.1", scaled("pooled_projections", 0), None),
    "flux.2: timestep times 1000 twice": ("flux.2 guided", scaled("timestep", 1000), None),
    "flux.2: rows and columns swapped": ("flux.2 guided", lambda i: i | {"img_ids": transposed(i["img_ids"])}, None),
    "flux.2: text positions left out": ("flux.2 guided", scaled("txt_ids", 0), None),
    "flux.2: FLUX.1's shift": ("flux.2 guided", None, with_mu(0.5)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_input_changes_the_latents(tiny_backbone, wrong):
    key, edit, sigmas = wrong
    variant = VARIANTS[key]
    backbone = tiny_backbone(variant.name)
    (*_, expected), _ = drawn_by_euler(backbone, variant, 8, 64, 64)
    rewrite = lambda module, args, inputs: (args, edit(inputs) if edit else inputs)  # noqa: E731
    with backbone.denoiser.register_forward_pre_hook(rewrite, with_kwargs=True):
        (*_, sample), _ = drawn_by_euler(backbone, variant, 8, 64, 64, sigmas)
    assert (sample - expected).abs().mean() > 0.01


@pytest.mark.parametrize("guided", ["sd3 guided", "flux.1 guided", "flux.2 guided"])
def test_the_negative_branch_changes_the_latents(tiny_backbone, guided):
    variant = VARIANTS[guided]
    backbone = tiny_backbone(variant.name)
    unguided = replace(variant, guidance=replace(variant.guidance, scale=1.0))
    (*_, expected), (*_, sample) = (drawn_by_euler(backbone, v, 8, 64, 64)[0] for v in (variant, unguided))
    assert (sample - expected).abs().mean() > 0.01


def test_flux2_latents_are_whitened_with_the_vaes_statistics(tiny_backbone):
    backbone = tiny_backbone(FLUX2)
    x = backbone.noise(64, 64, seeds())
    assert (backbone.vae_latents(x) - torch.nn.functional.pixel_shuffle(x, 2)).abs().mean() > 0.1
