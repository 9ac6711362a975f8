"""Master weights: a bfloat16 network learns as a float32 one does, in every part that holds weights."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline

from flowbp.backbones import load_backbone
from flowbp.backbones.sd3 import SD3Backbone
from flowbp.config import ConfigError, TuningConfig, dump, load
from flowbp.config.loading import CONFIG
from flowbp.runtime import tuned_model
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.runtime.tuning import trainable_parameters
from flowbp.runtime.weights import load_weights, save_weights
from flowbp.training.trainer import Trainer

STEPS = 30


def trainer(folder, *overrides):
    small = [
        "steps=2",
        "data.batch_size=2",
        "rollout.num_steps=12",
        "evaluation=null",
        "tuning.mode=full",
        "optimizer.lr=1e-5",
        "ema=0.9",
    ]
    return Trainer(load("demo", [f"output={folder}", *small, *overrides]))


def moved(folder, *overrides):
    """How far STEPS updates by the same gradients carry the network's, the optimizer's and the averaged weights."""
    run, noise = trainer(folder, *overrides), torch.Generator().manual_seed(0)
    start = [p.detach().float().clone() for p in run.model.parameters.values()]
    for step in range(STEPS):
        for p in run.model.parameters.values():
            p.grad = (1 + torch.randn(p.shape, generator=noise)).bfloat16().to(p.dtype)
        run.update(step)
    weights = {
        "network": run.model.parameters.values(),
        "optimizer": run.model.masters.values(),
        "average": run.model.ema.shadow_params,
    }
    return {
        name: torch.cat([(p.detach() - s).flatten() for p, s in zip(ps, start, strict=True)])
        for name, ps in weights.items()
    }


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    return moved(tmp_path_factory.mktemp("float32"))


def test_small_steps_move_master_weights_as_they_move_a_float32_network(in_float32, tmp_path):
    found = moved(tmp_path, "backbone.dtype=bfloat16")
    for name in ("optimizer", "average"):
        assert (found[name] - in_float32[name]).norm() < 0.01 * in_float32[name].norm(), name


def test_without_master_weights_bfloat16_rounds_most_steps_away(in_float32, tmp_path):
    found = moved(tmp_path, "backbone.dtype=bfloat16", "tuning.master_weights=false")["network"]
    assert (found == 0).float().mean() > 0.5 and found.norm() < 0.5 * in_float32["network"].norm()


def test_the_network_computes_with_its_own_rounding_of_the_master_weights(tmp_path):
    run = trainer(tmp_path, "backbone.dtype=bfloat16")
    run.step(0)
    for name, p in run.model.parameters.items():
        assert p.dtype == torch.bfloat16 and run.model.masters[name].dtype == torch.float32 and p.grad is None
        assert torch.equal(p, run.model.masters[name].bfloat16())
    assert any(not torch.equal(p.float(), run.model.masters[name]) for name, p in run.model.parameters.items())
    save_weights(run.model.backbone, tmp_path)
    assert {p.dtype for p in load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("masters", ["true", "false"])
def test_a_resumed_bfloat16_run_takes_the_step_of_an_unbroken_one(masters, tmp_path):
    runs = [trainer(tmp_path, "backbone.dtype=bfloat16", f"tuning.master_weights={masters}") for _ in range(2)]
    states = [(run.model, run.optimizer, run.rewards) for run in runs]
    runs[0].step(0)
    save_checkpoint(tmp_path, 1, *states[0])
    assert load_checkpoint(latest_checkpoint(tmp_path), *states[1]) == 1
    rows = [{key: run.step(1)[key] for key in ("loss", "grad_norm")} for run in runs]
    assert rows[0] == rows[1]
    for one, other in zip(
        *((*run.model.masters.values(), *run.model.parameters.values()) for run in runs), strict=True
    ):
        assert torch.equal(one, other)
    averages = list(zip(*(run.model.ema.shadow_params for run in runs), strict=True))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in averages)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("attn.to_kk", "'attn.to_kk' names no layer of this SD3Transformer2DModel.*; did you mean 'attn.to_k'?"),
        ("pos_embed.proj", "'pos_embed.proj' names pos_embed.proj, of class Conv2d, of this SD3Transformer2DModel"),
        ("attn", "'attn' names transformer_blocks.0.attn, of class Attention, of this SD3Transformer2DModel"),
    ],
)
def test_every_tuning_target_names_linear_layers(target, says):
    with pytest.raises(ConfigError, match=says):
        trainable_parameters(
            SD3Backbone(tiny_pipeline("StableDiffusion3Pipeline")), TuningConfig(targets=["attn.to_q", target])
        )


def test_a_misspelt_target_is_refused_before_a_prompt_is_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_model, "embed_once", lambda *_: pytest.fail("the prompts were embedded first"))
    with pytest.raises(ConfigError, match="did you mean 'attn.to_q'"):
        trainer(tmp_path, "tuning={mode: lora, targets: [attn.to_k, attn.to_qq]}", "data.embeddings=cached")


@pytest.mark.parametrize("broken", ["parameters", "average"])
def test_a_checkpoint_that_holds_nan_is_refused_as_weights(broken, tmp_path):
    overrides = [] if broken == "average" else ["ema=null"]
    run = trainer(tmp_path, *overrides)
    (tmp_path / CONFIG).write_text(dump(run.config))
    held = run.model.ema.shadow_params if broken == "average" else list(run.model.masters.values())
    with torch.no_grad():
        held[0].fill_(torch.nan)
    save_checkpoint(tmp_path, 1, run.model, run.optimizer, run.rewards)
    with pytest.raises(ValueError, match="step-000001 holds NaN or inf in 1 of its"):
        load_weights(load_backbone("shapes", max_sequence_length=1), latest_checkpoint(tmp_path))


def test_lora_is_its_own_master(tmp_path):
    run = trainer(tmp_path, "tuning.mode=lora", "backbone.dtype=bfloat16")
    assert all(run.model.masters[name] is p for name, p in run.model.parameters.items())
