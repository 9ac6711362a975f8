"""Trained weights in diffusers' own formats: written, read back into a backbone, and exported."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowbp.backbones import Backbone
from flowbp.config import load
from flowbp.config.loading import CONFIG
from flowbp.runtime.checkpoint import CHECKPOINT, STATE, latest_checkpoint, load_parameters, load_state
from flowbp.runtime.distributed import gathered
from flowbp.runtime.files import replacing
from flowbp.runtime.tuning import assign, trainable_parameters

LORA = "pytorch_lora_weights.safetensors"
TRANSFORMER = "transformer"


def save_weights(backbone: Backbone, output: Path, write: bool = True) -> Path:
    """Write the tuned weights into the folder `output`, and return their path.

    A LoRA is the file `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output)`; full weights are the
    folder `transformer/`, for `from_pretrained`. Every process must call it, because shards are gathered from all; the
    one with `write` writes.
    """
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

    ComfyUI knows the layers of all four classes by diffusers' names. But it takes alpha = rank where a file has no
    alpha keys, and diffusers does not accept alpha keys; so alpha / rank is multiplied into lora_B. Raises
    FileNotFoundError if the run holds no LoRA.
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
    """The denoiser's weights as its checkpoint has them, on the CPU. Raises ValueError if it comes from none."""
    denoiser = backbone.denoiser
    folder = denoiser.config.get("_name_or_path")
    if not folder:
        gone = "the backbone was not loaded from a folder, so its base weights are gone"
        raise ValueError(f"{gone}: set evaluation to null")
    return dict(type(denoiser).from_pretrained(folder, dtype=denoiser.dtype).named_parameters())


def load_weights(backbone: Backbone, source: Path) -> None:
    """Load the tuned weights of `source` into the backbone.

    source: a LoRA file or its folder, a run, the folder of a transformer, or a checkpoint of a run.

    Raises FileNotFoundError if there are no weights, ValueError if a saved layer has no place in the backbone.
    """
    file = weight_files(source)[0]
    if file.name == CHECKPOINT:
        load_training_checkpoint(backbone, file.parent)
    elif (file.parent / "config.json").is_file():
        backbone.denoiser.load_state_dict(type(backbone.denoiser).from_pretrained(file.parent).state_dict())
    else:
        load_lora(backbone, file)


def load_lora(backbone: Backbone, file: Path) -> None:
    """Add the LoRA of `file` to the denoiser. Raises ValueError if a layer of the file has no place there."""
    modules = dict(backbone.denoiser.named_modules())
    try:
        saved = lora_shapes(load_file(file))
    except (SafetensorError, KeyError) as error:
        way_out = "pass a run, its checkpoint, or a LoRA file"
        raise ValueError(f"{file} is not a LoRA in safetensors: {error}; {way_out}") from error
    shapes = {name: module.weight.shape for name, module in modules.items() if isinstance(module, nn.Linear)}
    strange = [name for name, shape in saved.items() if shapes.get(name) != shape]
    if strange:
        raise ValueError(
            f"{file} belongs to another model: {len(strange)} of its {len(saved)} layers, such as {strange[0]}, do not "
            f"fit this {type(backbone.denoiser).__name__}; load it into the backbone that its {CONFIG} names"
        )
    backbone.pipe.load_lora_weights(file.parent, weight_name=file.name)
    loaded = sum(name.endswith("lora_A") for name, _ in backbone.denoiser.named_modules())
    if loaded != len(saved):
        raise ValueError(f"{file} holds {len(saved)} LoRA layers but {loaded} were loaded")


def lora_shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shape [out, in] of the weight that each layer of a LoRA file adds to, by module name."""
    shapes = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            out = len(tensors[f"{layer}.lora_B.weight"])
            shapes[layer.removeprefix("transformer.")] = torch.Size((out, down.shape[1]))
    return shapes


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of `source`. Raises FileNotFoundError if there are none."""
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
    wanted = f"pass the folder of a finished run{hint}, or a LoRA file"
    raise FileNotFoundError(f"{source} holds no {LORA}, transformer/ or {CHECKPOINT}: {wanted}")


def load_training_checkpoint(backbone: Backbone, folder: Path) -> None:
    """Load what a run would have delivered after the checkpoint `folder`: its moving average, if it keeps one."""
    config = folder.parents[1] / CONFIG
    if not config.is_file():
        missing = f"{config}, which says what was trained, is missing"
        raise FileNotFoundError(f"{folder} is a checkpoint of a run, but {missing}")
    saved, parameters = load_parameters(folder), trainable_parameters(backbone, load(config).tuning)
    if saved.keys() != parameters.keys():
        tensors = f"{folder} holds {len(saved)} tensors and {config} trains {len(parameters)}"
        raise ValueError(f"{tensors}: they belong to different models")
    average = load_state(folder)["ema"]
    assign(parameters, dict(zip(parameters, average["shadow_params"], strict=True)) if average else saved)
    backbone.denoiser.eval()  # the layers of a new adapter drop out
