"""Every backbone draws what its pipeline draws: bit for bit in a plain Euler loop, to rounding through the fused ops."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from flowbp.backbones import BACKBONES
from flowbp.evaluation import bind_velocity
from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.trajectory import rollout

SD3, FLUX, FLUX2 = "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline"
TEXTS = ["a red circle", "two blue stars, far apart"]


@dataclass(frozen=True)
class Variant:
    """A class, and the same guidance in the pipeline's words and in ours."""

    name: str
    options: dict
    guidance: Guidance
    distilled: bool = field(default=False)


VARIANTS = {
    "sd3": Variant(SD3, {"guidance_scale": 1.0}, Guidance()),
    "sd3 guided": Variant(SD3, {"guidance_scale": 4.5}, Guidance(4.5)),
    "flux.1": Variant(FLUX, {"guidance_scale": 3.5}, Guidance(embedded=3.5)),
    "flux.1 guided": Variant(FLUX, {"guidance_scale": 3.5, "true_cfg_scale": 2.5, "negative_prompt": ["", ""]}, Guidance(2.5, embedded=3.5)),
    "flux.2 guided": Variant(FLUX2, {"guidance_scale": 4.0}, Guidance(4.0)),
    "flux.2 distilled": Variant(FLUX2, {"guidance_scale": 4.0}, Guidance(), distilled=True),
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
    positive, negative = (backbone.encode(texts) | embedded for texts in (TEXTS, ["", ""]))  # embeddings round with the batch size
    velocity = GuidedVelocity(backbone.velocity, positive, negative, variant.guidance, backbone.guidance_branches == "batched")
    x = backbone.noise(height, width, seeds())
    sigmas = backbone.sigmas(steps, height, width) if sigmas is None else sigmas
    trajectory = []
    for sigma, h in zip(sigmas, torch.diff(sigmas), strict=False):
        v = velocity(x, sigma)
        x = (x.float() + h * v).to(v.dtype)
        trajectory.append(x)
    return trajectory, backbone.decode(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_latents_and_images_are_the_pipelines_own(tiny_backbone, variant, dtype):
    backbone = tiny_backbone(variant.name, dtype, "pipeline", variant.distilled)
    for size in ((64, 64), (96, 64)):
        for steps in (4, 14):
            expected, pictures = drawn_by_pipeline(backbone, variant, steps, *size)
            trajectory, images = drawn_by_euler(backbone, variant, steps, *size)
            assert len(trajectory) == len(expected) == steps
            for ours, theirs in zip(trajectory, expected, strict=True):
                assert ours.dtype == dtype and torch.equal(ours, theirs), f"{size}, {steps} steps"
            assert torch.equal(images, pictures) and images.std() > 0.1


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_fused_rollout_is_the_pipelines_to_rounding(tiny_backbone, variant):
    backbone = tiny_backbone(variant.name, torch.float32, "pipeline", variant.distilled)
    (*_, expected), _ = drawn_by_pipeline(backbone, variant, 4, 96, 64)
    velocity = bind_velocity(backbone, TEXTS, variant.guidance)
    sample = rollout(velocity, backbone.noise(96, 64, seeds()), backbone.sigmas(4, 96, 64)).sample
    assert (sample - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_bfloat16_rollout_is_no_further_from_float64_than_the_pipeline(tiny_backbone, variant):
    """All three start from the same noise and the same embeddings and run the same bfloat16 weights."""
    backbone = tiny_backbone(variant.name, torch.bfloat16, "pipeline", variant.distilled)
    (*_, pipelines), _ = drawn_by_pipeline(backbone, variant, 4, 96, 64)
    velocity, noise = bind_velocity(backbone, TEXTS, variant.guidance), backbone.noise(96, 64, seeds())

    exact = BACKBONES[variant.name](copy.deepcopy(backbone.pipe).to(torch.float64), "pipeline")
    exact.encode = lambda texts: {key: value.double() for key, value in backbone.encode(texts).items()}
    sigmas = backbone.sigmas(4, 96, 64)
    truth = rollout(bind_velocity(exact, TEXTS, variant.guidance), noise.double(), sigmas).sample
    errors = {
        name: (sample.double() - truth).norm().item()
        for name, sample in {
            "pipeline": pipelines,
            "rollout": rollout(velocity, noise, sigmas).sample,
            "float32 latents": rollout(velocity, noise.float(), sigmas).sample,
        }.items()
    }
    print(variant, errors)
    assert truth.dtype == torch.float64 and errors["rollout"] <= 1.1 * errors["pipeline"] and errors["float32 latents"] <= errors["pipeline"]
