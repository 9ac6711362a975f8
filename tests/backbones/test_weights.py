"""Tuned weights leave in formats that others read: diffusers' LoRA and transformer folders, and ComfyUI's LoRA keys."""

import re
from functools import cache

import fused_ops
import pytest
import torch
from displaced import frozen
from safetensors.torch import load_file
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline
from typer.testing import CliRunner

from flowbp.backbones.classes import BACKBONES
from flowbp.cli.commands import app
from flowbp.config import build_method, load
from flowbp.evaluation import scores as evaluation
from flowbp.methods import METHODS
from flowbp.runtime.weights import LORA, export_comfyui, load_weights, save_weights
from flowbp.training.trainer import Trainer

TOKENS = 48
SETTINGS = [
    "steps=5", "data.batch_size=2", "data.embeddings=live", "evaluation=null", "ema=null", "reward.smooth=null",
    "rollout={num_steps: 6, height: 32, width: 32}", f"backbone.max_sequence_length={TOKENS}",
    "optimizer={lr: 1.0e-2, warmup: 0}", "tuning={rank: 2, alpha: 6}",
]  # fmt: skip


# The layers that LoRA adapts by default, as ComfyUI 0.19.3 and 0.10.0 know them (`model_lora_keys_unet`). Their
# `load_lora` left none of our exported tensors over, and moved each weight by alpha / rank B A to 2e-7.
JOINT = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
COMFYUI = {
    "StableDiffusion3Pipeline": {f"transformer_blocks.attn.{name}" for name in JOINT.split()},
    "FluxPipeline": {f"transformer_blocks.attn.{name}" for name in JOINT.split()}
    | {f"transformer_blocks.{part}.net.{name}" for part in ("ff", "ff_context") for name in ("0.proj", "2")}
    | {f"single_transformer_blocks.attn.to_{name}" for name in "qkv"},
    "Flux2KleinPipeline": {f"transformer_blocks.attn.{name}" for name in JOINT.split()}
    | {f"single_transformer_blocks.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")},
    "ZImagePipeline": {
        f"{part}.attention.{name}"
        for part in ("layers", "context_refiner", "noise_refiner")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    },
}
# Every class with two methods or one, and every method with a class: a LoRA's file does not know its method.
PAIRS = [(name, method) for i, name in enumerate(TINY_PIPELINES) for method in list(METHODS)[i :: len(TINY_PIPELINES)]]


@pytest.fixture(scope="module", params=TINY_PIPELINES)
def trained(request, tmp_path_factory):
    """The class name, a function for a trainer of the class, and one for that trainer after five steps of a method."""
    name = request.param
    folder = tmp_path_factory.mktemp("pipelines") / name
    tiny_pipeline(name).save_pretrained(folder)

    @cache
    def trainer_with(kernels):
        embedded = ["guidance.embedded=3.5"] if name == "FluxPipeline" else []
        return Trainer(
            load("demo", [f"output={folder.parent / 'run'}", f"backbone.name={folder}", *SETTINGS, *embedded])
        )

    def trainer():
        return trainer_with(fused_ops.KERNELS)

    def train(method):
        run = trainer()
        fields = {"last_n": 3} if method == "refl" else {}
        run.config = run.config.model_copy(update={"method": build_method({"name": method} | fields)})
        run.optimizer.state.clear()
        with torch.no_grad():
            for key, parameter in run.model.parameters.items():
                parameter.copy_(run.model.base[key])
        for step in range(run.config.steps):
            row = run.step(step)
            assert not row["skipped"] and row["grad_norm"] > 0
        return run

    return name, trainer, train


def draw(backbone, config):
    with frozen(backbone.denoiser):
        return evaluation.generate(backbone, ["a red circle"], [7], config.rollout, config.guidance)


@pytest.mark.parametrize(("trained", "method"), PAIRS, indirect=["trained"])
def test_a_lora_of_every_method_changes_the_images_and_loads_into_a_fresh_pipeline(trained, method, tmp_path):
    name, _, train = trained
    run = train(method)
    expected = draw(run.model.backbone, run.config)
    path = save_weights(run.model.backbone, tmp_path)

    pipe = tiny_pipeline(name)  # diffusers' own reading, without this package
    base = draw(BACKBONES[name](pipe, max_sequence_length=TOKENS), run.config)
    pipe.load_lora_weights(tmp_path)
    images = draw(BACKBONES[name](pipe, max_sequence_length=TOKENS), run.config)
    fused_ops.assert_as_unfused(expected, images)
    assert (images - base).abs().max() > 1e-4
    assert len(load_file(path)) == len(run.model.parameters)


def test_an_exported_lora_carries_alpha_in_its_weights(trained, tmp_path):
    """Read without any metadata, as ComfyUI does, it draws what the run's own file draws."""
    name, _, train = trained
    run = train("flowbp-sparse")
    expected = draw(run.model.backbone, run.config)
    save_weights(run.model.backbone, tmp_path)
    result = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "comfyui.safetensors")])
    assert result.exit_code == 0, result.output
    tensors, original = load_file(tmp_path / "comfyui.safetensors"), load_file(tmp_path / LORA)
    assert tensors.keys() == original.keys()
    layers = {re.fullmatch(r"transformer\.(\w+)\.\d+(.+)\.lora_[AB]\.weight", key).groups() for key in tensors}
    assert {"".join(layer) for layer in layers} <= COMFYUI[name]

    without_alpha, exported = tiny_pipeline(name), tiny_pipeline(name)
    without_alpha.load_lora_weights(original)
    exported.load_lora_weights(tensors)
    images, wrong = (
        draw(BACKBONES[name](pipe, max_sequence_length=TOKENS), run.config) for pipe in (exported, without_alpha)
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert (wrong - expected).abs().max() > 1e-4


def test_a_lora_of_another_class_is_refused(trained, tmp_path):
    name, trainer, _ = trained
    save_weights(trainer().model.backbone, tmp_path)
    other = "ZImagePipeline" if name != "ZImagePipeline" else "FluxPipeline"
    with pytest.raises(ValueError, match="belongs to another model: .* do not fit this"):
        load_weights(BACKBONES[other](tiny_pipeline(other)), tmp_path)


def test_the_default_lora_reaches_every_block(trained):
    _, trainer, _ = trained
    model = trainer().model
    blocks = {key.split(".")[0] + "." + key.split(".")[1] for key in model.parameters}
    denoiser = model.backbone.denoiser
    layers = {
        key for key, module in denoiser.named_modules() if isinstance(module, torch.nn.ModuleList) and "." not in key
    }
    expected = {f"{key}.{i}" for key in layers for i in range(len(denoiser.get_submodule(key)))}
    assert blocks == expected


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_full_weights_are_a_transformer_folder_that_from_pretrained_reads(name, tmp_path):
    tuned = BACKBONES[name](tiny_pipeline(name, seed=1))
    folder = save_weights(tuned, tmp_path)
    read = type(tuned.denoiser).from_pretrained(folder)
    fresh = BACKBONES[name](tiny_pipeline(name))
    load_weights(fresh, tmp_path)
    for key, value in tuned.denoiser.state_dict().items():
        assert torch.equal(read.state_dict()[key], value) and torch.equal(fresh.denoiser.state_dict()[key], value)


@pytest.mark.parametrize("strength", [0.25, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_strength_of_full_weights_is_a_way_between_the_base_and_them(strength, dtype, tmp_path):
    name = "StableDiffusion3Pipeline"
    base, tuned = (BACKBONES[name](tiny_pipeline(name, seed=seed).to(dtype)) for seed in (0, 1))
    save_weights(tuned, tmp_path)
    fresh = BACKBONES[name](tiny_pipeline(name).to(dtype))
    load_weights(fresh, tmp_path, strength=strength)
    for key, p in fresh.denoiser.named_parameters():
        start, end = (side.denoiser.get_parameter(key).double() for side in (base, tuned))
        between = start + strength * (end - start)
        assert (p.double() - between).abs().max() <= torch.finfo(dtype).eps * between.abs().max()


def test_the_strength_of_a_lora_multiplies_what_it_adds(trained, tmp_path):
    name, _, train = trained
    save_weights(train("flowbp-sparse").model.backbone, tmp_path)

    def deltas(strength):
        backbone = BACKBONES[name](tiny_pipeline(name))
        load_weights(backbone, tmp_path, strength=strength)
        layers = [module for module in backbone.denoiser.modules() if hasattr(module, "get_delta_weight")]
        return [layer.get_delta_weight(*layer.active_adapters) for layer in layers]

    whole, half = deltas(1.0), deltas(0.5)
    assert any(delta.any() for delta in whole)
    torch.testing.assert_close(half, [delta / 2 for delta in whole])


def test_a_run_of_full_weights_has_no_lora_to_export(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder of a finished run with tuning.mode=lora"):
        export_comfyui(tmp_path, tmp_path / "lora.safetensors")
