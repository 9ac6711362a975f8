"""Trained weights in diffusers' own formats: written, read back into a backbone, and exported."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowbp.backbones import Backbone
from flowbp.config import load
from flowbp.runtime.checkpoint import CHECKPOINT, STATE, latest_checkpoint, load_parameters, load_state
from flowbp.runtime.distributed import gathered
from flowbp.runtime.files import replacing
from flowbp.runtime.tuning import assign, trainable_parameters

__all__ = ["LORA", "base_weights", "export_comfyui", "load_weights", "save_weights", "weight_files"]

LORA = "pytorch_lora_weights.safetensors"
TRANSFORMER = "transformer"


def save_weights(backbone: Backbone, output: Path, write: bool = True) -> Path:
    """Write the tuned weights: LoRA as `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output)`; full
    weights as the folder `transformer/`, for `from_pretrained`. Every process calls it, for shards are gathered from
    all; one writes. Returns the path."""
    denoiser = backbone.denoiser
    if not getattr(denoiser, "peft_config", None):
        state = gathered(denoiser.state_dict())
        if write:
            with torch.device("meta"):
                whole = type(denoiser).from_config(denoiser.config)
            whole.load_state_dict(state, assign=True)
            with replacing(output / TRANSFORMER) as scratch:
                whole.save_pretrained(scratch)
        return output / TRANSFORMER
    from peft import get_peft_model_state_dict

    layers = gathered(get_peft_model_state_dict(denoiser))
    if not write:
        return output / LORA
    adapter = denoiser.peft_config["default"].to_dict()  # says alpha: a file without it is read as alpha = rank
    adapter["target_modules"] = sorted(adapter["target_modules"])
    output.mkdir(exist_ok=True)
    with replacing(output / LORA) as scratch:
        kept = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": adapter}
        type(backbone.pipe).save_lora_weights(output, weight_name=scratch.name, **kept)
    return output / LORA


def export_comfyui(source: Path, target: Path) -> None:
    """Write the LoRA of a run's folder `source` as one file `target` for ComfyUI, which diffusers reads as well.

    ComfyUI knows the layers of all four classes by diffusers' names, but takes alpha = rank where a file has no alpha
    keys, which diffusers does not accept; so alpha / rank is multiplied into lora_B. Raises FileNotFoundError when the
    run holds no LoRA.
    """
    if not (source / LORA).is_file():
        raise FileNotFoundError(f"{source} holds no {LORA}: pass the folder of a finished run with tuning.mode=lora")
    with safe_open(source / LORA, "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scale = adapter["transformer.lora_alpha"] / adapter["transformer.r"]
    scaled = {name: value * scale if ".lora_B." in name else value for name, value in tensors.items()}
    with replacing(target) as scratch:
        save_file(scaled, scratch, {"format": "pt"})


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The denoiser's weights as its checkpoint has them, on the CPU. Raises ValueError when it was not loaded from
    one.
    """
    denoiser = backbone.denoiser
    folder = denoiser.config.get("_name_or_path")
    if not folder:
        raise ValueError(
            "the backbone was not loaded from a folder, so its base weights are gone: set evaluation to null"
        )
    return dict(type(denoiser).from_pretrained(folder, dtype=denoiser.dtype).named_parameters())


def load_weights(backbone: Backbone, source: Path) -> None:
    """Load tuned weights into the backbone: a LoRA file or folder, a run, the folder of a transformer, or one of a
    run's checkpoints.

    Raises FileNotFoundError when there are no weights, ValueError when not every saved layer found its place.
    """
    files = weight_files(source)
    folder = files[0].parent
    if files[0].name == CHECKPOINT:
        load_training_checkpoint(backbone, folder)
    elif (folder / "config.json").is_file():
        weights = type(backbone.denoiser).from_pretrained(folder).state_dict()
        backbone.denoiser.load_state_dict(weights)
    else:
        try:
            saved = lora_shapes(load_file(files[0]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{files[0]} is not a LoRA in safetensors: {error}; pass a run, its checkpoint, or a LoRA file"
            ) from error
        weights = {
            name: module.weight.shape
            for name, module in backbone.denoiser.named_modules()
            if isinstance(module, nn.Linear)
        }
        strange = [name for name, shape in saved.items() if weights.get(name) != shape]
        if strange:
            network = type(backbone.denoiser).__name__
            raise ValueError(
                f"{files[0]} belongs to another model: {len(strange)} of its {len(saved)} layers, such as "
                f"{strange[0]}, "
                f"do not fit this {network}; load it into the backbone that its config.yaml names"
            )
        backbone.pipe.load_lora_weights(folder, weight_name=files[0].name)
        loaded = sum(
            name.endswith("lora_A")
            for name, module in backbone.denoiser.named_modules()
            if isinstance(module, nn.ModuleDict)
        )
        if loaded != len(saved):
            raise ValueError(f"{files[0]} holds {len(saved)} LoRA layers but {loaded} were loaded")


def lora_shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shape [out, in] of the weight that each layer of a LoRA file adds to, by module name."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    layers = [name.removesuffix(down) for name in tensors if name.endswith(down)]
    return {
        name.removeprefix("transformer."): torch.Size((len(tensors[name + up]), tensors[name + down].shape[1]))
        for name in layers
    }


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of `source`: what `load_weights` reads. Raises FileNotFoundError when there are
    none.
    """
    if source.is_file():
        return [source]
    for name in (LORA, CHECKPOINT):
        if (source / name).is_file():
            return [source / name] + [source / STATE] * (name == CHECKPOINT)
    for folder in (source / TRANSFORMER, source):
        weights = sorted(folder.glob("*.safetensors"))
        if weights and ((folder / "config.json").is_file() or len(weights) == 1):
            return weights
    unfinished = latest_checkpoint(source)
    hint = f", or its checkpoint {unfinished}" if unfinished else ""
    raise FileNotFoundError(
        f"{source} holds no {LORA}, transformer/ or {CHECKPOINT}: pass the folder of a finished run{hint}, or a LoRA "
        "file"
    )


def load_training_checkpoint(backbone: Backbone, folder: Path) -> None:
    """Load the weights that a run would have delivered after the checkpoint `folder`: the moving average if it keeps
    one.
    """
    config = folder.parents[1] / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} is a checkpoint of a run, but {config}, which says what was trained, is missing"
        )
    saved, parameters = load_parameters(folder), trainable_parameters(backbone, load(config).tuning)
    if saved.keys() != parameters.keys():
        raise ValueError(
            f"{folder} holds {len(saved)} tensors and {config} trains {len(parameters)}: they belong to different "
            "models"
        )
    average = load_state(folder)["ema"]
    assign(parameters, dict(zip(parameters, average["shadow_params"], strict=True)) if average else saved)
    backbone.denoiser.eval()  # the layers of a new adapter drop out
