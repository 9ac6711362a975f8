"""Master weights: a bfloat16 network learns as a float32 one does, in every part that holds weights."""

from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from torch._subclasses import FakeTensorMode

from flowbp.backbones import load_backbone
from flowbp.backbones.sd3 import SD3Backbone
from flowbp.config import ConfigError, dump, load
from flowbp.config.loading import CONFIG
from flowbp.config.schema import OptimizerConfig, TuningConfig
from flowbp.evaluation.pages import facts
from flowbp.runtime import tuned_model
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.runtime.run_folder import RunFolder
from flowbp.runtime.tuning import build_optimizer, trainable_parameters
from flowbp.runtime.weights import LORA, load_weights, pinned, save_weights
from flowbp.training import run as running
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


def test_adamw_is_one_kernel_on_a_gpu_and_as_it_was_on_a_cpu():
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(3, device=device)) for device in ("cuda", "cpu")]
        fused = [build_optimizer([weight], OptimizerConfig()).defaults["fused"] for weight in weights]
    assert fused == [True, False]


def test_lora_is_its_own_master(tmp_path):
    run = trainer(tmp_path, "tuning.mode=lora", "backbone.dtype=bfloat16")
    assert all(run.model.masters[name] is p for name, p in run.model.parameters.items())


# -- tuning.init -------------------------------------------------------------------------------------------------------

OF_LORA = ["tuning={mode: lora, rank: 4, alpha: 6}", "rollout.num_steps=4", "reward.smooth=null"]


def deltas(backbone):
    """What LoRA adds to each layer's weight."""
    layers = {name: m for name, m in backbone.denoiser.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run that trained a LoRA of rank 4 and alpha 6 for two steps."""
    folder = tmp_path_factory.mktemp("first")
    run = trainer(folder / "run", *OF_LORA, "optimizer={lr: 1.0e-2, warmup: 0}")
    RunFolder(folder / "run").open(run.config)
    for step in range(2):
        run.step(step)
    save_checkpoint(folder / "run", 2, run.model, run.optimizer, run.rewards)
    with run.model.using(run.model.tuned) as backbone:
        save_weights(backbone, folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("given", "tuning", "dtype"),
    [
        ("", "rank: 4, alpha: 6", "float32"),
        (LORA, "rank: 7, alpha: 3", "bfloat16"),
        ("checkpoints/step-000002", "rank: 7, alpha: 3", "bfloat16"),
    ],
)
def test_training_starts_from_a_lora_whatever_its_alpha_and_rank(given, tuning, dtype, first, tmp_path):
    theirs = load_backbone("shapes", max_sequence_length=1)
    load_weights(theirs, first)
    init = f"init: {first / given}"
    adapter, others = f"tuning={{mode: lora, {tuning}, {init}}}", ["optimizer.lr=1e-2", f"backbone.dtype={dtype}"]
    run = trainer(tmp_path, *OF_LORA, adapter, *others)
    ours, expected = deltas(run.model.backbone), deltas(theirs)
    assert ours.keys() == expected.keys() and max(delta.abs().max() for delta in expected.values()) > 1e-3
    for name, delta in expected.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-5, atol=1e-8)
    start = {name: p.detach().clone() for name, p in run.model.parameters.items()}
    run.step(0)
    assert all(not torch.equal(p, start[name]) for name, p in run.model.parameters.items() if "blocks.0." in name)
    with run.model.using(run.model.base):  # what the report calls "before"
        assert all(torch.equal(p, start[name]) for name, p in run.model.parameters.items())


def test_training_starts_from_all_weights(tmp_path):
    theirs = trainer(tmp_path / "run")
    with torch.no_grad():
        for p in theirs.model.parameters.values():
            p.add_(0.01)
    theirs.model.follow_masters()
    RunFolder(tmp_path / "run").open(theirs.config)
    save_checkpoint(tmp_path / "run", 1, theirs.model, theirs.optimizer, theirs.rewards)
    with theirs.model.using(theirs.model.tuned) as backbone:
        save_weights(backbone, tmp_path / "run")
    for init in (tmp_path / "run", latest_checkpoint(tmp_path / "run")):
        run = trainer(tmp_path / "next", f"tuning.init={init}")
        start = {name: p.detach().clone() for name, p in run.model.parameters.items()}
        for p, tuned, last in zip(
            start.values(), theirs.model.ema.shadow_params, theirs.model.parameters.values(), strict=True
        ):
            assert torch.equal(p, tuned) and not torch.equal(p, last)
        run.step(0)
        with run.model.using(run.model.base):
            assert all(torch.equal(p, start[name]) for name, p in run.model.parameters.items())


def test_a_run_records_the_digest_of_its_start_and_resumes_from_no_other(first, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "report", lambda *_: None)  # seconds a run
    (tmp_path / LORA).write_bytes((first / LORA).read_bytes())
    small = ["evaluation=null", "data.batch_size=1", f"tuning.init={tmp_path / LORA}", *OF_LORA]
    whole, broken = (load("demo", [f"output={tmp_path / name}", "steps=2", *small]) for name in ("whole", "broken"))
    running.train(whole)
    running.train(broken.model_copy(update={"steps": 1}))
    running.train(broken, resume=True)
    weights = [load_file(tmp_path / name / LORA) for name in ("whole", "broken")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    recorded = load(tmp_path / "whole" / CONFIG)
    assert recorded.tuning.init_sha256 == sha256((first / LORA).read_bytes()).hexdigest()
    assert pinned(recorded.tuning) == recorded.tuning
    told = facts(recorded, rows=RunFolder(tmp_path / "whole").metrics()).of_training
    assert f"LoRA of rank 4, started from {tmp_path / LORA}, learning rate" in told["model"]

    (tmp_path / LORA).write_bytes((tmp_path / "whole" / LORA).read_bytes())
    with pytest.raises(ValueError, match="a resumed run keeps its config .* changes tuning.init_sha256 from"):
        running.train(whole, resume=True)
    with pytest.raises(ValueError, match="not tuning.init_sha256=.*: bring the old weights back"):
        running.train(recorded, resume=True)
    (tmp_path / LORA).unlink()
    with pytest.raises(FileNotFoundError, match="or a LoRA file"):
        running.train(recorded, resume=True)


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        ("rank: 3", "has rank 4, and tuning.rank=3 is less: set 4 or more"),
        (
            "targets: [attn.to_q, attn.to_k]",
            r"has 23 layers that tuning.targets does not name, such as .*: set tuning.targets=\[attn.add_k_proj,",
        ),
        ("mode: full", "holds a LoRA, which needs tuning.mode=lora, not full"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_a_prompt_is_embedded(tuning, says, first, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_model, "embed_once", lambda *_: pytest.fail("the prompts were embedded first"))
    with pytest.raises(ConfigError, match=says):
        trainer(tmp_path, "tuning.mode=lora", f"tuning={{{tuning}, init: {first}}}")


def test_a_lora_does_not_start_from_all_weights(tmp_path):
    init = save_weights(load_backbone("shapes"), tmp_path)
    with pytest.raises(ConfigError, match="holds all weights, which need tuning.mode=full, not lora"):
        trainer(tmp_path, f"tuning={{mode: lora, init: {init}}}")
