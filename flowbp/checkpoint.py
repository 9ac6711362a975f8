"""What a run writes: its folder, resumable checkpoints, and weights in diffusers' own formats. Nothing is ever half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowbp.backbones import Backbone
from flowbp.rewards import Mixture

__all__ = [
    "base_weights",
    "check_run",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "open_run",
    "save_checkpoint",
    "save_weights",
]

CONFIG = "config.yaml"
LORA = "pytorch_lora_weights.safetensors"


def check_run(output: Path, resolved_config: str, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may write into `output`: an empty or absent folder, or a run that a switch says to resume or to replace."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: continue the run, or start it afresh")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / CONFIG).is_file():
        raise FileExistsError(f"{output} exists and is not a run of flowbp (it has no {CONFIG}): choose another output=")
    if not (resume or overwrite):
        raise FileExistsError(f"{output} already holds a run: pass --resume to go on, --overwrite to start afresh, or another output=")
    if resume and (output / CONFIG).read_text() != resolved_config:
        raise ValueError(f"a resumed run must keep its config: train from {output / CONFIG}, or choose another output=")


def open_run(output: Path, resolved_config: str, overwrite: bool) -> None:
    """Make the folder of a run, which `check_run` let pass, and write its resolved config."""
    if overwrite and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).write_text(resolved_config)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends without error."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(scratch, folder)


def save_checkpoint(output: Path, step: int, parameters: dict[str, Tensor], optimizer, ema, rewards: Mixture) -> None:
    """Everything that a run needs to go on after `step` optimizer steps. Older checkpoints are removed once this one is whole."""
    folder = output / "checkpoints" / f"step-{step:06d}"
    with written_whole(folder) as scratch:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, scratch / "parameters.safetensors")
        state = {"optimizer": optimizer.state_dict(), "ema": ema and ema.state_dict(), "rewards": rewards.state_dict()}
        torch.save(state, scratch / "state.pt")
        (scratch / "step.json").write_text(json.dumps({"step": step}))
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other)


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has one."""
    return max((output / "checkpoints").glob("step-*"), default=None)


def load_checkpoint(folder: Path, parameters: dict[str, Tensor], optimizer, ema, rewards: Mixture) -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the number of steps done."""
    saved = load_file(folder / "parameters.safetensors")
    if saved.keys() != parameters.keys():
        raise ValueError(f"{folder} holds other parameters than this config trains: {len(saved)} saved, {len(parameters)} expected")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    state = torch.load(folder / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    if ema:
        ema.load_state_dict(state["ema"])
    rewards.load_state_dict(state["rewards"])
    return json.loads((folder / "step.json").read_text())["step"]


def save_weights(backbone: Backbone, output: Path) -> Path:
    """Write the tuned weights: LoRA as `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output)`; full weights as the folder
    `transformer/`, for `from_pretrained`. Returns the path."""
    denoiser = backbone.denoiser
    if getattr(denoiser, "peft_config", None):
        from peft import get_peft_model_state_dict

        with written_whole(output / "lora") as scratch:
            type(backbone.pipe).save_lora_weights(
                scratch,
                transformer_lora_layers=get_peft_model_state_dict(denoiser),
                transformer_lora_adapter_metadata=denoiser.peft_config[
                    "default"
                ].to_dict(),  # without it load_lora_weights assumes alpha = rank
            )
            os.replace(scratch / LORA, output / LORA)
        shutil.rmtree(output / "lora")
        return output / LORA
    with written_whole(output / "transformer") as scratch:
        denoiser.save_pretrained(scratch)
    return output / "transformer"


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The denoiser's weights as its checkpoint has them, on the CPU. Raises ValueError when it was not loaded from one."""
    denoiser = backbone.denoiser
    folder = denoiser.config.get("_name_or_path")
    if not folder:
        raise ValueError("the backbone was not loaded from a folder, so its base weights are gone: set evaluation to null")
    return dict(type(denoiser).from_pretrained(folder, dtype=denoiser.dtype).named_parameters())


def load_weights(backbone: Backbone, source: Path) -> None:
    """Load what `save_weights` wrote under `source` (a run's folder) into the backbone.

    Raises FileNotFoundError when there are no weights, ValueError when not every saved layer found its place.
    """
    if (source / LORA).is_file():
        backbone.pipe.load_lora_weights(source, weight_name=LORA)
        saved = sum(name.endswith("lora_A.weight") for name in load_file(source / LORA))
        loaded = sum(name.endswith("lora_A") for name, module in backbone.denoiser.named_modules() if isinstance(module, nn.ModuleDict))
        if loaded != saved:
            raise ValueError(f"{source / LORA} holds {saved} LoRA layers but {loaded} were loaded: it belongs to another model class")
    elif (source / "transformer").is_dir():
        weights = type(backbone.denoiser).from_pretrained(source / "transformer").state_dict()
        backbone.denoiser.load_state_dict(weights)
    else:
        raise FileNotFoundError(f"{source} holds neither {LORA} nor transformer/: pass the folder of a finished run")
