"""Truths of the shipped weights and of the recipe that made them."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import AutoencoderKL  # noqa: E402
from transformers import CLIPModel, CLIPTokenizer  # noqa: E402

from flowbp.shapes import MONITOR, PIPELINE, REWARD  # noqa: E402
from flowbp.shapes.recipe import models, stages  # noqa: E402
from flowbp.shapes.recipe.captions import caption  # noqa: E402
from flowbp.shapes.recipe.scenes import render, sample_negative, sample_scene, sample_spec, true_specs  # noqa: E402

CAPTIONS = ["a red circle left of a blue square", "three crosses", ""]


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return stages.load(PIPELINE)


@pytest.fixture(scope="module")
def flow(pipe):
    flow = models.Flow(pipe.tokenizer).eval()
    for part in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(flow, part).load_state_dict(getattr(pipe, part).state_dict())
    return flow


def test_weights_are_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in PIPELINE.parent.rglob("*") if path.is_file()) <= 8e6


def test_every_word_is_one_token():
    tokenizer = models.build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in models.WORDS)
    assert len(tokenizer("a photo of some dogs").input_ids) > 7  # other words fall apart into letters, none is lost


def test_pipeline_samples_at_its_default_size(pipe):
    images = pipe(
        CAPTIONS[0], num_inference_steps=3, guidance_scale=1.0, max_sequence_length=1, output_type="np"
    ).images
    assert images.shape == (1, 32, 32, 3) and 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("zeros", [1, 12])
def test_training_conditions_as_the_pipeline_does(pipe, flow, zeros):
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
        )
        ours = flow.encode(models.tokenize(pipe.tokenizer, CAPTIONS), zeros)
    assert torch.equal(tokens, ours[0]) and torch.equal(pooled, ours[1])


def test_one_zero_token_with_a_bias_equals_256_of_them(pipe, flow):
    x, sigma = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.9])
    ids = models.tokenize(pipe.tokenizer, CAPTIONS)
    with torch.no_grad():
        theirs = pipe.transformer(x, *flow.encode(ids, 256), sigma * 1000, return_dict=False)[0]
        torch.testing.assert_close(flow(x, sigma, ids, zeros=256), theirs, atol=1e-4, rtol=1e-4)


def test_whitening_leaves_the_reconstruction_as_it_was():
    torch.manual_seed(0)
    vae, x = models.build_vae(), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        models.whiten(vae, before.mode())
        after = vae.encode(x).latent_dist
        mean, std = before.mode().mean((0, 2, 3), keepdim=True), before.mode().std((0, 2, 3), keepdim=True)
        torch.testing.assert_close(after.mode(), (before.mode() - mean) / std, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.std, before.std / std, atol=1e-4, rtol=1e-4)
        fresh = AutoencoderKL.from_config(vae.config)
        torch.manual_seed(0)
        fresh.load_state_dict(models.build_vae().state_dict())
        torch.testing.assert_close(
            vae.decode(after.mode()).sample, fresh.decode(before.mode()).sample, atol=1e-4, rtol=1e-4
        )


def test_autoencoder_keeps_renderings_apart_from_noise(pipe):
    rng = np.random.default_rng(0)
    x = stages.to_float(np.stack([render(sample_scene(sample_spec(rng), rng), rng) for _ in range(32)]))
    with torch.no_grad():
        error = (pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample - x).square().mean()
    assert error < 0.01  # 26 dB


@pytest.mark.parametrize("folder", [REWARD, MONITOR])
def test_reward_prefers_the_caption_of_a_rendering_to_a_hard_negative(folder):
    model, tokenizer = CLIPModel.from_pretrained(folder, local_files_only=True), CLIPTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    rng = np.random.default_rng(7)
    specs = [sample_spec(rng, "test") for _ in range(200)]
    scenes = [sample_scene(spec, rng) for spec in specs]
    x = stages.to_float(np.stack([render(scene, rng) for scene in scenes]))
    true = [frozenset(caption(t) for t in true_specs(scene, -2.0)) for scene in scenes]
    wrong = [sample_negative(spec, rng, t, known=False) for spec, t in zip(specs, true, strict=True)]
    with torch.no_grad():
        right, false = (
            models.score(model, x, models.tokenize(tokenizer, [caption(s) for s in group])) for group in (specs, wrong)
        )
    assert (right > false).float().mean() > 0.8


def test_every_stage_of_the_recipe_runs(tmp_path):
    tiny = stages.Recipe(
        images=64, vae_steps=2, vae_batch=4, flow_steps=2, flow_clean_steps=1, flow_batch=4, processes=1,
        scorer_steps=2,
        scorer_batch=8, repeats=0,
    )  # fmt: skip
    for stage in stages.STAGES.values():
        stage(tmp_path, tiny)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["monitor", "pipeline", "reward"]
    assert CLIPModel.from_pretrained(tmp_path / "weights" / "reward").dtype == torch.float32
