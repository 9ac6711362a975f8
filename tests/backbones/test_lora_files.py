"""LoRA files of other programs: read as they mean it, or refused; never loaded in name alone."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline

from flowbp.backbones.classes import BACKBONES
from flowbp.config.schema import TuningConfig
from flowbp.runtime.files import seal
from flowbp.runtime.tuning import trainable_parameters
from flowbp.runtime.weights import LORA, export_comfyui, load_weights, save_weights, start_from

RANK, ALPHA = 2, 6
ALL = tuple(TINY_PIPELINES)
FLUX, FLUX2, SD3, ZIMAGE = "FluxPipeline", "Flux2KleinPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"


def fresh(name):
    return BACKBONES[name](tiny_pipeline(name))


@pytest.fixture(scope="module", params=ALL)
def lora(request, tmp_path_factory):
    """(class name, {layer: (A, B)}, a run's folder): a LoRA of alpha 6 and rank 2, all of whose entries are random."""
    backbone = fresh(request.param)
    parameters = trainable_parameters(backbone, TuningConfig(rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for p in parameters.values():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    folder = tmp_path_factory.mktemp(request.param)
    tensors = load_file(save_weights(backbone, folder))
    ups = {name: name.replace("lora_A", "lora_B") for name in tensors if "lora_A" in name}
    layers = {
        down.removeprefix("transformer.").removesuffix(".lora_A.weight"): (tensors[down], tensors[up])
        for down, up in ups.items()
    }
    return request.param, layers, folder


def renamed(layers, down, up, alpha=None, name=str):
    """Each layer's A and B under the endings `down` and `up`; without a key for alpha, B carries alpha / rank."""
    tensors = {}
    for layer, (a, b) in layers.items():
        tensors |= {name(layer) + down: a, name(layer) + up: b if alpha else b * ALPHA / RANK}
        if alpha:
            tensors[name(layer) + alpha] = torch.tensor(float(ALPHA))
    return tensors


FORMS = {
    "alpha beside lora_A": (".lora_A.weight", ".lora_B.weight", ".alpha", "transformer.{}".format),
    "PEFT": (".lora_A.weight", ".lora_B.weight", None, "base_model.model.{}".format),
    "PEFT, adapter named": (".lora_A.default.weight", ".lora_B.default.weight", None, "base_model.model.{}".format),
    "without a prefix": (".lora_A.weight", ".lora_B.weight", None, str),
    "ComfyUI": (".lora_A.weight", ".lora_B.weight", ".alpha", "diffusion_model.{}".format),
    "old diffusers": (".lora.down.weight", ".lora.up.weight", None, "transformer.{}".format),
    "older diffusers": (
        "_lora.down.weight",
        "_lora.up.weight",
        None,
        lambda layer: f"transformer.{layer}".replace(".attn.to", ".attn.processor.to").replace("to_out.0", "to_out"),
    ),
    "kohya": (".lora_down.weight", ".lora_up.weight", ".alpha", lambda layer: "lora_unet_" + layer.replace(".", "_")),
}


def check_loaded(backbone, layers):
    """The network's weights have moved by alpha / rank B A in `layers`, and nowhere else."""
    adapted = {name: m for name, m in backbone.denoiser.named_modules() if hasattr(m, "get_delta_weight")}
    assert adapted.keys() == layers.keys()
    for layer, (a, b) in layers.items():
        (adapter,) = adapted[layer].active_adapters
        torch.testing.assert_close(adapted[layer].get_delta_weight(adapter), ALPHA / RANK * b @ a)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_means_the_same_in_every_programs_names(lora, form, tmp_path):
    name, layers, _ = lora
    save_file(renamed(layers, *FORMS[form]), tmp_path / "theirs.safetensors")
    backbone = fresh(name)
    load_weights(backbone, tmp_path / "theirs.safetensors")
    check_loaded(backbone, layers)


@pytest.mark.parametrize("form", ["kohya", "older diffusers"])
def test_training_starts_from_a_lora_in_another_programs_names(lora, form, tmp_path):
    name, layers, _ = lora
    few = dict(list(layers.items())[::2])
    save_file(renamed(few, *FORMS[form]), tmp_path / "theirs.safetensors")
    backbone = fresh(name)
    parameters = start_from(tmp_path / "theirs.safetensors", backbone, TuningConfig(rank=RANK + 1, alpha=7))
    assert len(parameters) == 2 * len(layers) and all(p.requires_grad for p in parameters.values())
    check_loaded(backbone, {layer: (a, b if layer in few else 0 * b) for layer, (a, b) in layers.items()})


def fused(layers, prefix, down, up, alpha):
    """The double block's q, k, v of the image as the one layer that FLUX's own code has, in block-diagonal form."""
    own = {layer: layers[layer] for layer in (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")}
    scale = 1 if alpha else ALPHA / RANK
    downs, ups = zip(*own.values(), strict=True)
    tensors = {prefix + down: torch.cat(downs), prefix + up: torch.block_diag(*ups) * scale}
    return own, tensors | ({prefix + alpha: torch.tensor(3.0 * ALPHA)} if alpha else {})


@pytest.mark.parametrize(
    ("program", "prefix", "endings"),
    [
        ("kohya", "lora_unet_double_blocks_0_img_attn_qkv", (".lora_down.weight", ".lora_up.weight", ".alpha")),
        ("ai-toolkit", "diffusion_model.double_blocks.0.img_attn.qkv", (".lora_A.weight", ".lora_B.weight", None)),
    ],
)
def test_layers_that_another_program_fuses_are_split_by_diffusers_or_refused(lora, program, prefix, endings, tmp_path):
    name, layers, _ = lora
    if name in (SD3, ZIMAGE):
        layers = {f"transformer_blocks.0.attn.to_{part}": next(iter(layers.values())) for part in "qkv"}
    own, tensors = fused(layers, prefix, *endings)
    save_file(tensors, tmp_path / "theirs.safetensors")
    backbone = fresh(name)
    if name == FLUX2 or (name, program) == (FLUX, "kohya"):
        load_weights(backbone, tmp_path / "theirs.safetensors")
        check_loaded(backbone, own)
    else:
        with pytest.raises(ValueError, match=r"theirs.safetensors.* (do not fit this|does not read|as a LoRA)"):
            load_weights(backbone, tmp_path / "theirs.safetensors")
        assert not hasattr(backbone.denoiser, "peft_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_lora_in_fewer_bits_is_read_into_the_networks_dtype(lora, dtype, tmp_path):
    name, layers, _ = lora
    narrow = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in layers.items()}
    save_file(renamed(narrow, *FORMS["alpha beside lora_A"]), tmp_path / "theirs.safetensors")
    backbone = fresh(name)
    load_weights(backbone, tmp_path / "theirs.safetensors")
    check_loaded(backbone, {layer: (a.float(), b.float()) for layer, (a, b) in narrow.items()})


def test_a_lora_that_was_trained_with_dropout_is_read_without(tmp_path):
    backbone = fresh(SD3)
    trainable_parameters(backbone, TuningConfig(rank=RANK, dropout=0.5))
    save_weights(backbone, tmp_path)
    read = fresh(SD3)
    load_weights(read, tmp_path)
    assert not any(module.training for module in read.denoiser.modules())


def test_layers_of_a_text_encoder_are_left_out_and_named(lora, tmp_path, caplog):
    name, layers, _ = lora
    backbone = fresh(name)
    stray = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{stray}.lora_A.weight": torch.ones(2, 16), f"{stray}.lora_B.weight": torch.ones(16, 2)}
    save_file(renamed(layers, *FORMS["alpha beside lora_A"]) | extra, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        load_weights(backbone, tmp_path / "a.safetensors")
    assert "2 tensors have no place in the network and are left out: [" in caplog.text and stray in caplog.text
    check_loaded(backbone, layers)


def first(layers):
    return next(iter(layers))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, a, b: t[b].fill_(torch.nan), "holds NaN or inf in 1 of its"),
        (lambda t, a, b: t[a][0].fill_(-torch.inf), "holds NaN or inf in 1 of its"),
        (lambda t, a, b: t.pop(b), "belongs to another model: 1 of its .* layers .* do not fit"),
        (lambda t, a, b: t.update({a: t[a][:, 1:].clone()}), "belongs to another model: 1 of its .* do not fit"),
        (lambda t, a, b: t.update({a: t[a][1:].clone()}), "belongs to another model: 1 of its .* do not fit"),
        (lambda t, a, b: t.update({a: t[a][0, 0].clone()}), "belongs to another model: 1 of its .* do not fit"),
        (lambda t, a, b: t.update({a: t[a][:0].clone(), b: t[b][:, :0].clone()}), "another model: 1 of its"),
        (lambda t, a, b: t.update({a: t[a].long()}), "belongs to another model: 1 of its .* do not fit"),
        (lambda t, a, b: t.update({a[:-13] + "alpha": torch.ones(2)}), "belongs to another model: 1 of its"),
        (lambda t, a, b: t.clear(), "belongs to another model: .* do not fit"),
    ],
)
def test_a_damaged_lora_is_refused_by_name_and_leaves_the_network_alone(lora, change, says, tmp_path):
    name, _, folder = lora
    tensors = load_file(folder / LORA)
    down = first(tensors).replace("lora_B", "lora_A")
    change(tensors, down, down.replace("lora_A", "lora_B"))
    save_file(tensors, tmp_path / "a.safetensors")
    backbone = fresh(name)
    with pytest.raises(ValueError, match=says) as error:
        load_weights(backbone, tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value) and not hasattr(backbone.denoiser, "peft_config")


@pytest.mark.parametrize("said", ["[", "[1]", "{}", json.dumps({"transformer.r": 3, "transformer.lora_alpha": 3})])
def test_metadata_that_does_not_fit_the_file_is_refused(lora, said, tmp_path):
    name, _, folder = lora
    save_file(load_file(folder / LORA), tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match="a.safetensors"):
        load_weights(fresh(name), tmp_path / "a.safetensors")


def test_only_a_lora_that_says_its_alpha_is_exported(lora, tmp_path):
    _, layers, _ = lora
    save_file(renamed(layers, *FORMS["PEFT"]), tmp_path / LORA)
    with pytest.raises(ValueError, match="does not say its alpha, so no run wrote it: export the folder of a run"):
        export_comfyui(tmp_path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("damage", ["a tensor less", "another model", "NaN"])
def test_a_transformer_folder_that_does_not_fit_is_refused(damage, tmp_path):
    file = save_weights(fresh(FLUX2), tmp_path / "best") / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if damage == "a tensor less":
        tensors.pop("proj_out.weight")
    elif damage == "NaN":
        tensors["proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    seal(file.parent)  # damage after that is another test's
    says = "holds NaN or inf in 1 of its" if damage == "NaN" else "belongs to another model: .* do not fit this"
    with pytest.raises(ValueError, match=says):
        load_weights(fresh(FLUX if damage == "another model" else FLUX2), tmp_path / "best")
