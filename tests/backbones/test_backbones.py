"""What every backbone promises beside parity: noise levels of its own per sample, gradients, readable refusals, and no
method in sight.
"""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from fused_ops import assert_as_unfused
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline

import flowbp
from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity, check_guidance
from flowbp.backbones.classes import BACKBONES
from flowbp.guidance import Guidance
from flowbp.methods import METHODS, draw_plan
from flowbp.replay import Recompute
from flowbp.runtime.weights import base_weights
from flowbp.surrogate import backward
from flowbp.trajectory import rollout, rollout_with_graph

TEXTS = ["a red circle", "two blue stars, far apart"]


def guidance_of(backbone, scale=1.0):
    return Guidance(scale, embedded=3.5 if backbone.embeds_guidance else None)


def seeds():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def test_every_class_has_a_tiny_pipeline():
    assert BACKBONES.keys() == TINY_PIPELINES.keys()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["unguided", "guided"])
def test_each_sample_may_have_its_own_noise_level(tiny_backbone, name, scale):
    backbone = tiny_backbone(name)
    velocity, x = bind_velocity(backbone, TEXTS, guidance_of(backbone, scale)), backbone.noise(64, 64, seeds())
    with torch.no_grad():
        both = velocity(x, torch.tensor([0.8, 0.3]))
        first, second = velocity(x, torch.tensor(0.8)), velocity(x, torch.tensor(0.3))
    torch.testing.assert_close(both, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_sample_does_not_depend_on_its_batch(tiny_backbone, name):
    backbone = tiny_backbone(name)
    x, guidance, sigma = backbone.noise(64, 64, seeds()), guidance_of(backbone), torch.tensor(0.6)
    with torch.no_grad():
        together = bind_velocity(backbone, TEXTS, guidance)(x, sigma)
        alone = bind_velocity(backbone, TEXTS[1:], guidance)(x[1:], sigma)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_images_and_velocity_are_differentiable_in_the_latents_and_prompts_are_not(tiny_backbone, name):
    backbone = tiny_backbone(name)
    x = backbone.noise(32, 48, seeds()).requires_grad_()
    images = backbone.decode(x)
    assert images.shape == (2, 3, 32, 48) and images.min() >= 0 and images.max() <= 1
    velocity = bind_velocity(backbone, TEXTS, guidance_of(backbone))
    assert not any(value.requires_grad for value in velocity.positive.values())
    for output in (images, velocity(x, torch.tensor(0.6))):
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.5


@pytest.mark.parametrize("name", BACKBONES)
def test_every_part_starts_frozen_and_in_evaluation_mode(name):
    pipe = BACKBONES[name](tiny_pipeline(name)).pipe
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3 and not any(
        p.requires_grad or part.training for part in modules for p in part.parameters()
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_precision_decides_the_dtype_of_the_latents_alone(tiny_backbone, name):
    for precision in ("pipeline", "float32"):
        backbone = tiny_backbone(name, torch.bfloat16, precision)
        x = backbone.noise(32, 32, seeds())
        assert x.dtype == (torch.float32 if precision == "float32" or name == "ZImagePipeline" else torch.bfloat16)
        with torch.no_grad():
            for scale, dtype in ((1.0, torch.bfloat16), (3.0, x.dtype)):  # guided in the latents' dtype
                v = bind_velocity(backbone, TEXTS, guidance_of(backbone, scale))(x, torch.tensor(0.6))
                assert v.dtype == dtype
            assert backbone.decode(x).dtype == torch.float32


@pytest.mark.parametrize("solver, recompute", [("euler", "always"), ("euler", "never"), ("adams-2", "always")])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_bfloat16_velocity_enters_the_step_and_the_cache_without_loss(tiny_backbone, name, scale, solver, recompute):
    """Samples and gradient are those of velocities that were cast to float32 before, to the bit. The cache holds half
    the bytes where velocities are not guided.
    """
    backbone = copy.deepcopy(tiny_backbone(name, torch.bfloat16, "float32"))
    backbone.denoiser.requires_grad_(True)
    sigmas, noise = backbone.sigmas(6, 32, 32), backbone.noise(32, 32, seeds())
    plan = draw_plan(METHODS["flowbp-lagrange"](), sigmas.double().numpy(), np.random.default_rng(0), solver)
    narrow = bind_velocity(backbone, TEXTS, guidance_of(backbone, scale))
    wide = replace(narrow, network=lambda x, sigma, given: narrow.network(x, sigma, given).to(x.dtype))
    found = []
    for velocity in (narrow, wide):
        trajectory = rollout(velocity, noise, sigmas, plan, recompute=Recompute(recompute), solver=solver)
        backward(plan, trajectory, velocity.replay, torch.ones_like(noise))
        rounded = velocity is narrow and scale == 1
        assert trajectory.velocities.rows.dtype == (torch.bfloat16 if rounded else torch.float32)
        samples = trajectory.sample, rollout(velocity, noise, sigmas, solver=solver).sample
        with torch.no_grad():
            samples += (rollout_with_graph(velocity, noise, sigmas, solver),)
        found.append([*samples, *(p.grad for p in backbone.denoiser.parameters() if p.grad is not None)])
        backbone.denoiser.zero_grad()
    assert len(found[0]) > 10 and all(map(torch.equal, *found))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_saved_pipeline_loads_offline_and_draws_the_same(name, tmp_path):
    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    loaded, built = load_backbone(str(tmp_path), max_sequence_length=48), BACKBONES[name](pipe, max_sequence_length=48)
    x, guidance = built.noise(64, 64, seeds()), guidance_of(built)
    with torch.no_grad():
        velocities = [bind_velocity(backbone, TEXTS, guidance)(x, torch.tensor(0.6)) for backbone in (loaded, built)]
    assert_as_unfused(*velocities)
    assert torch.equal(loaded.sigmas(7, 64, 64), built.sigmas(7, 64, 64))


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_network_needs_is_made_on_the_device_of_the_latents(tiny_backbone, name):
    """Tensors of the meta device meet no tensor of another one."""
    built = tiny_backbone(name)
    conditioning = bind_velocity(built, TEXTS, guidance_of(built)).positive
    pipe = copy.deepcopy(built.pipe)
    pipe.transformer.to("meta"), pipe.vae.to("meta")
    backbone, x = BACKBONES[name](pipe), built.noise(32, 32, seeds()).to("meta")
    lengths = {key: value if key == "lengths" else value.to("meta") for key, value in conditioning.items()}
    assert backbone.velocity(x, torch.tensor(0.6, device="meta"), lengths).shape == x.shape
    assert backbone.decode(x).shape == (2, 3, 32, 32)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "distilled", "guidance", "says"),
    [
        ("FluxPipeline", False, Guidance(), r"set guidance.embedded \(FLUX.1-dev: 3.5\)"),
        (
            "StableDiffusion3Pipeline",
            False,
            Guidance(embedded=3.5),
            "takes no guidance scale: set guidance.embedded to null",
        ),
        (
            "Flux2KleinPipeline",
            True,
            Guidance(4.0),
            "takes no negative prompt: set guidance.scale to 1, not 4.0",
        ),
    ],
)
def test_guidance_that_the_network_does_not_have_is_refused(tiny_backbone, name, distilled, guidance, says):
    backbone = tiny_backbone(name, distilled=distilled)
    with pytest.raises(ValueError, match=says):
        bind_velocity(backbone, TEXTS, guidance)
    check_guidance(backbone, replace(guidance_of(backbone), scale=1.0))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_size_that_tokens_do_not_tile_is_refused(tiny_backbone, name):
    for ask in (lambda b: b.sigmas(4, 64, 72), lambda b: b.noise(72, 64, seeds())):
        with pytest.raises(ValueError, match="multiples of 16 pixels, not "):
            ask(tiny_backbone(name))


def test_a_scheduler_of_another_kind_is_refused():
    pipe = tiny_pipeline("FluxPipeline")
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="samples by UniPCMultistepScheduler; a rollout takes the deterministic steps"):
        BACKBONES["FluxPipeline"](pipe)
    pipe = tiny_pipeline("FluxPipeline")
    pipe.scheduler.register_to_config(stochastic_sampling=True)
    with pytest.raises(ValueError, match="a rollout takes the deterministic steps.*, with stochastic_sampling off"):
        BACKBONES["FluxPipeline"](pipe)


@pytest.mark.parametrize("name", BACKBONES)
def test_encoding_prompts_leaves_them_as_they_are(tiny_backbone, name):
    texts = list(TEXTS)
    tiny_backbone(name).encode(texts)
    assert texts == TEXTS


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("scheduler", "num_train_timesteps", 500), ("scheduler", "invert_sigmas", True), ("vae", "shift_factor", None)],
)
def test_a_config_that_would_draw_other_images_is_refused_when_the_model_is_loaded(name, part, key, value):
    pipe = tiny_pipeline(name)
    getattr(pipe, part).register_to_config(**{key: value})
    with pytest.raises(ValueError, match=f"{key}.*: set {key} .*in {part}/"):
        BACKBONES[name](pipe)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved pipeline whose weight files carry a variant in their names."""
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    tiny_pipeline("StableDiffusion3Pipeline").save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_2", "vae", "scheduler"])
def test_a_folder_without_a_part_names_the_part(saved, part, tmp_path):
    shutil.copytree(saved, tmp_path / "pipe", ignore=shutil.ignore_patterns(part))
    with pytest.raises(OSError, match=rf"pipe lacks the folder {part}, .*write \"{part}\": \[null, null\]"):
        load_backbone(str(tmp_path / "pipe"))


def test_weight_files_of_a_variant_are_read_by_its_name(saved):
    backbone = load_backbone(str(saved), variant="fp16", max_sequence_length=1)
    base = base_weights(backbone, "fp16")  # a run of full weights reads its base again, to evaluate it
    assert all(torch.equal(base[name], p) for name, p in backbone.denoiser.named_parameters())
    with pytest.raises(OSError, match=r"pipe cannot be read with backbone.variant=None: .*need backbone.variant=fp16"):
        load_backbone(str(saved))


def test_unknown_names_and_models_out_of_reach_say_what_to_do():
    with pytest.raises(ValueError, match="did you mean 'flux.1-dev'"):
        load_backbone("flux1-dev")
    with pytest.raises(ValueError, match="precision must be 'pipeline' or 'float32', not 'bf16'"):
        load_backbone("shapes", precision="bf16")
    with pytest.raises(OSError, match="hf download nobody/nothing --local-dir FOLDER"):
        load_backbone("nobody/nothing")


# -- layering ----------------------------------------------------------------------------------------------------------


def test_backbones_name_no_method_and_methods_no_backbone():
    package = Path(flowbp.__file__).parent
    methods = [cls.__name__ for cls in METHODS.values()] + [
        "flowbp.methods",
        "flowbp.plan",
        "flowbp.active_sets",
        "flowbp.quadrature",
    ]
    networks = [*BACKBONES, "flowbp.backbones", "diffusers", "torch"]
    for folder, words in (("backbones", methods), ("methods", networks)):
        for path in (package / folder).glob("*.py"):
            found = re.findall(rf"\b(?:{'|'.join(map(re.escape, words))})\b", path.read_text())
            assert not found, f"{path} speaks of {found}"


def test_the_worked_example_of_the_docs_is_the_file_itself():
    root = Path(flowbp.__file__).parents[1]
    page = (root / "docs/backbones.md").read_text(encoding="utf-8")
    assert f"```python\n{(root / 'flowbp/backbones/zimage.py').read_text(encoding='utf-8')}```" in page
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (root / "docs" / target).exists(), target


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "ZImagePipeline"])
def test_a_prompt_of_which_the_end_is_not_read_is_told(name, caplog):
    backbone = BACKBONES[name](tiny_pipeline(name), max_sequence_length=48)
    backbone.encode(["a cat"])
    assert not caplog.text
    backbone.encode(["a cat " * 48])
    assert "of which 48 are read: raise backbone.max_sequence_length" in caplog.text
