"""Trained weights in diffusers' own formats: written, read back into a backbone, and exported."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowbp import log
from flowbp.config import ConfigError, load
from flowbp.config.loading import CONFIG
from flowbp.config.schema import TuningConfig
from flowbp.given import cut, digest_files
from flowbp.runtime.checkpoint import CHECKPOINT, LORA, TRANSFORMER, load_parameters, load_state, weight_files
from flowbp.runtime.distributed import gathered, process_state
from flowbp.runtime.files import check_seal, replacing, seal
from flowbp.runtime.tensors import read_tensors, seal_tensors
from flowbp.runtime.tuning import assign, trainable_parameters, trained

if TYPE_CHECKING:  # importing it takes seconds, and whoever checks a command's input does without
    from flowbp.backbones.base import Backbone

# A layer's A, B or alpha as diffusers (old and new), PEFT, kohya and ComfyUI write it.
LORA_NAME = re.compile(
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_)*(.+?)"
    r"(?:[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.default)?\.weight|\.alpha)"
)
ROLES = {"down": "A", "up": "B", None: "alpha"}


def save_weights(backbone: "Backbone", output: Path) -> Path:
    """Write the tuned weights into the folder `output`, and return their path.

    A LoRA is the file `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output)`; full weights are the
    folder `transformer/`, for `from_pretrained`. Every process must call it, because shards are gathered from all. The
    main process writes.
    """
    denoiser, writes = backbone.denoiser, process_state().is_main_process
    if writes:
        output.mkdir(exist_ok=True)
    if not getattr(denoiser, "peft_config", None):
        state = gathered(denoiser.state_dict())
        if writes:
            with torch.device("meta"):
                whole = type(denoiser).from_config(denoiser.config)
            whole.load_state_dict(state, assign=True)
            with replacing(output / TRANSFORMER) as scratch:
                whole.save_pretrained(scratch)
                seal(scratch)
        return output / TRANSFORMER
    from peft import get_peft_model_state_dict

    layers = gathered(get_peft_model_state_dict(denoiser))
    if writes:
        adapter = denoiser.peft_config["default"].to_dict()  # says alpha: a file without it is read as alpha = rank
        adapter["target_modules"] = sorted(adapter["target_modules"])
        with replacing(output / LORA) as scratch:
            kept = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": adapter}
            type(backbone.pipe).save_lora_weights(scratch.parent, weight_name=scratch.name, **kept)
            seal_tensors(scratch)
    return output / LORA


def export_comfyui(source: Path, target: Path) -> None:
    """Write the LoRA of a run's folder `source` as one file `target` for ComfyUI, which diffusers reads as well.

    ComfyUI knows the layers of all four classes by diffusers' names. But it takes alpha = rank where a file has no
    alpha keys, and diffusers does not accept alpha keys; so alpha / rank is multiplied into lora_B. Raises
    FileNotFoundError if the run holds no LoRA, ValueError if the LoRA is not a run's.
    """
    if not (source / LORA).is_file():
        raise FileNotFoundError(f"{source} holds no {LORA}: pass the folder of a finished run with tuning.mode=lora")
    tensors, adapter = read_lora(source / LORA)
    if adapter is None:
        raise ValueError(f"{source / LORA} does not say its alpha, so no run wrote it: export the folder of a run")
    scale = adapter["transformer.lora_alpha"] / adapter["transformer.r"]
    scaled = {name: value * scale if ".lora_B." in name else value for name, value in tensors.items()}
    with replacing(target) as scratch:
        save_file(scaled, scratch, {"format": "pt"})


def base_weights(backbone: "Backbone", variant: str | None = None, init: Path | None = None) -> dict[str, Tensor]:
    """All weights of the denoiser as `init` has them, or else its checkpoint, on the CPU. Raises ValueError if there is
    neither.
    """
    denoiser = backbone.denoiser
    if init is not None:
        file = weight_files(init)[0]
        checkpoint = file.name == CHECKPOINT
        return delivered(file.parent, trained(backbone)) if checkpoint else read_transformer(backbone, file.parent)
    if not (folder := denoiser.config.get("_name_or_path")):
        raise ValueError("the base weights of a backbone that no folder holds are gone: set evaluation to null")
    return dict(type(denoiser).from_pretrained(folder, dtype=denoiser.dtype, variant=variant).named_parameters())


def start_from(init: Path, backbone: "Backbone", tuning: TuningConfig) -> dict[str, Tensor]:
    """Load the weights of `init` into the backbone and do what `trainable_parameters` does.

    A LoRA fills the first rows of A and columns of B of the adapter that `tuning` describes, whose alpha / rank B is
    divided by, so that the network is that of the file. B is 0 elsewhere.

    Raises what `load_weights` does, and ConfigError for weights of the other mode and for a LoRA that does not fit in.
    """
    from peft.tuners.lora import LoraLayer

    where, layers = f"tuning.init={init}", {}
    load_weights(backbone, init, torch.float32)
    for name, module in backbone.denoiser.named_modules():
        for adapter, scale in module.scaling.items() if isinstance(module, LoraLayer) else ():
            layers[name] = module.lora_A[adapter].weight, module.lora_B[adapter].weight * scale
    if bool(layers) != (tuning.mode == "lora"):
        found = "a LoRA, which needs tuning.mode=lora" if layers else "all weights, which need tuning.mode=full"
        raise ConfigError(f"{where} holds {found}, not {tuning.mode}")
    if layers:
        backbone.denoiser.unload_lora()
    parameters = trainable_parameters(backbone, tuning)
    if layers and (rank := max(len(a) for a, _ in layers.values())) > tuning.rank:
        raise ConfigError(f"{where} has rank {rank}, and tuning.rank={tuning.rank} is less: set {rank} or more")
    if strange := [name for name in layers if f"{name}.lora_A.default.weight" not in parameters]:
        targets = ",".join(sorted({re.sub(r"^\w+\.\d+\.", "", name) for name in layers}))
        unnamed = f"{len(strange)} layers that tuning.targets does not name, such as {strange[0]}"
        raise ConfigError(f"{where} has {unnamed}: set tuning.targets=[{targets}]")
    with torch.no_grad():
        for name, (a, b) in layers.items():
            parameters[f"{name}.lora_A.default.weight"][: len(a)] = a
            parameters[f"{name}.lora_B.default.weight"][:, : len(a)] = b * tuning.rank / (tuning.alpha or tuning.rank)
    return parameters


def pinned(tuning: TuningConfig) -> TuningConfig:
    """`tuning` with the digest of `init`. Raises ValueError if it has another one, FileNotFoundError if it is gone."""
    if tuning.init is None:
        return tuning
    found = digest_files(weight_files(tuning.init))
    if tuning.init_sha256 not in (None, found):
        changed = f"tuning.init={tuning.init} has the SHA-256 {found}, not tuning.init_sha256={tuning.init_sha256}"
        raise ValueError(f"{changed}: bring the old weights back, or leave the digest out and choose another output=")
    return tuning.model_copy(update={"init_sha256": found})


def load_weights(
    backbone: "Backbone", source: Path, lora_dtype: torch.dtype | None = None, strength: float = 1.0
) -> None:
    """Load the tuned weights of `source` into the backbone.

    source: a LoRA file or its folder, a run, the folder of a transformer, or a checkpoint of a run.
    lora_dtype: of a LoRA; None means the network's.
    strength: what is added to the backbone's own weights is multiplied by it: a LoRA, or the difference of all weights.

    Raises FileNotFoundError if there are no weights, ValueError if they do not fit the backbone, are damaged, or hold
    NaN or inf.
    """
    file, denoiser = weight_files(source)[0], backbone.denoiser
    own = {} if strength == 1 else {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    if file.name == CHECKPOINT:
        load_training_checkpoint(backbone, file.parent)
    elif (file.parent / "config.json").is_file():
        backbone.denoiser.load_state_dict(read_transformer(backbone, file.parent))
    else:
        load_lora(backbone, file, lora_dtype or backbone.denoiser.dtype)
    if strength != 1 and getattr(denoiser, "peft_config", None):
        denoiser.set_adapters(list(denoiser.peft_config), strength)
    elif strength != 1:
        with torch.no_grad():
            for name, p in denoiser.named_parameters():
                p.copy_(own[name].float().lerp(p.float(), strength))
    denoiser.eval()  # the layers of a new adapter drop out


def read_transformer(backbone: "Backbone", folder: Path) -> dict[str, Tensor]:
    """All weights of `folder`, which fit the denoiser. Raises ValueError where they do not, or it is quantised."""
    check_base(folder, getattr(backbone.denoiser, "is_quantized", False))
    for file in (folder / "config.json", *folder.glob("*.safetensors*")):
        check_seal(file)
    saved, report = type(backbone.denoiser).from_pretrained(folder, output_loading_info=True)
    own, state = backbone.denoiser.state_dict(), saved.state_dict()
    strange = [*report["missing_keys"], *report["unexpected_keys"], *own.keys() ^ state.keys()]
    strange += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if strange:
        raise another_model(backbone, folder, f"{len(strange)} tensors, such as {cut(strange[0])},")
    return check_finite(state, folder)


def check_base(folder: Path, quantised: bool) -> None:
    """Raise ValueError if `folder` holds all weights of a transformer, and the base is quantised."""
    if quantised and (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds all weights, plain ones: load it with backbone.quantise.weights=null")


def another_model(backbone: "Backbone", source: Path, what: str) -> ValueError:
    misfit = f"{what} do not fit this {type(backbone.denoiser).__name__}"
    return ValueError(f"{source} belongs to another model: {misfit}; load it into the backbone of its {CONFIG}")


def check_finite(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """`tensors`. Raises ValueError if one holds NaN or inf."""
    if broken := [name for name, value in tensors.items() if not value.float().isfinite().all()]:
        many = f"{len(broken)} of its {len(tensors)} tensors, such as {cut(broken[0])}"
        raise ValueError(f"{source} holds NaN or inf in {many}: what wrote it had diverged; take earlier weights")
    return tensors


def load_lora(backbone: "Backbone", file: Path, dtype: torch.dtype) -> None:
    """Add the LoRA of `file` to the denoiser, in `dtype`. Its names are diffusers', or any that diffusers converts to
    them.

    What has no place in the denoiser, such as layers of a text encoder, is left out with a warning. Raises ValueError
    if nothing has a place, or if a layer has another shape.
    """

    def ask(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> Any:
        try:
            return function(tensors, **options)
        except Exception as error:  # diffusers raises whatever a strange file leads it to
            cause = cut(repr(error), 300)
            raise ValueError(f"diffusers does not read {file} as a LoRA of this class: {cause}") from error

    denoiser, (tensors, adapter) = backbone.denoiser, read_lora(file)
    check_finite(tensors, file)
    linear = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)}
    shapes = {name: torch.Size((layer.out_features, layer.in_features)) for name, layer in linear.items()}
    layers, left = placed(tensors, shapes)
    if left:  # another program's names
        found = ask(backbone.pipe.lora_state_dict, dict(tensors), return_alphas=True)
        weights, alphas = (found, None) if isinstance(found, dict) else found
        layers, left = placed(weights | (alphas or {}), shapes)
    strange = [name for name, parts in layers.items() if not fits(shapes[name], **parts)]
    if strange or not layers:
        misfits, of = (strange, f"{len(layers)} layers") if strange else (left, f"{len(tensors)} tensors")
        raise another_model(backbone, file, f"{len(misfits)} of its {of} ({', '.join(map(cut, misfits[:3]))})")
    if left:
        names = [cut(name) for name in left[:8]]
        log.warning("%s: %d tensors have no place in the network and are left out: %s", file, len(left), names)
    state = {}
    for name, parts in layers.items():
        scale = parts["alpha"].item() / len(parts["A"]) if "alpha" in parts else 1
        adapter = None if "alpha" in parts else adapter  # which says the same of all layers
        down, up = parts["A"].to(dtype), (parts["B"].float() * scale).to(dtype)
        state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    ask(denoiser.load_lora_adapter, state, metadata=adapter, low_cpu_mem_usage=True)
    for name in layers if dtype != denoiser.dtype else ():  # diffusers has rounded them to the network's
        for part in ("lora_A", "lora_B"):
            (linear,) = getattr(denoiser.get_submodule(name), part).values()
            linear.weight.data = state[f"transformer.{name}.{part}.weight"].to(linear.weight.device)
    if (loaded := sum(name.endswith("lora_A") for name, _ in denoiser.named_modules())) != len(layers):
        raise ValueError(f"{file} holds {len(layers)} LoRA layers, but by its metadata {loaded} were loaded")


def placed(tensors: dict[str, Tensor], layers: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({layer: its "A", "B" and "alpha"}, names of the tensors that have no place among `layers`)."""
    places = {layer.replace(".", "_").removesuffix("_0"): layer for layer in layers}
    found, left = {}, []
    for name, value in tensors.items():
        match = LORA_NAME.fullmatch(name.replace(".processor.", "."))
        layer = match and places.get(match[1].replace(".", "_").removesuffix("_0"))
        if match and layer:
            found.setdefault(layer, {})[ROLES.get(match[2], match[2])] = value
        else:
            left.append(name)
    return found, left


def fits(shape: torch.Size, A: Tensor | None = None, B: Tensor | None = None, alpha: Tensor | None = None) -> bool:
    """Whether A [r, in], B [out, r] and one alpha or none belong to a layer of `shape` [out, in]."""
    if A is None or B is None or not A.ndim == B.ndim == 2 or not (A.is_floating_point() and B.is_floating_point()):
        return False
    return (len(B), *A.shape[1:]) == shape and len(A) == B.shape[1] > 0 and (alpha is None or alpha.numel() == 1)


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of `file`, and what it says of its adapter."""
    try:
        tensors, about = read_tensors(file, sealed=False)
        if any(len(name) > 1000 for name in tensors):
            raise ValueError("a tensor's name has more than 1000 characters")
        return tensors, json.loads(about.get("lora_adapter_metadata", "null"))
    except (OSError, ValueError, RecursionError) as error:
        way_out = "pass a run, its checkpoint, or a LoRA file"
        raise ValueError(f"{file} is not a LoRA in safetensors: {cut(error, 300)}; {way_out}") from error


def load_training_checkpoint(backbone: "Backbone", folder: Path) -> None:
    """Load what a run would have delivered after the checkpoint `folder`: its moving average, if it keeps one."""
    config = folder.parents[1] / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{config}, which says what the checkpoint {folder} trained, is missing")
    parameters = trainable_parameters(backbone, load(config, run_code=False).tuning)
    assign(parameters, delivered(folder, parameters))


def delivered(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a run would have delivered of its `parameters` after the checkpoint `folder`."""
    saved, average = load_parameters(folder, parameters), load_state(folder)["ema"]
    return check_finite(dict(zip(parameters, average["shadow_params"], strict=True)) if average else saved, folder)
