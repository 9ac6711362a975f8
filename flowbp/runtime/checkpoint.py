"""Resumable checkpoints: all that a run needs to go on after a step. One is whole or not there."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from flowbp.rewards import WeightedRewards
from flowbp.runtime.distributed import gathered, process_state, shard_like
from flowbp.runtime.files import replacing
from flowbp.runtime.tuning import assign

if TYPE_CHECKING:
    from flowbp.runtime.tuned_model import TunedModel

__all__ = ["latest_checkpoint", "load_checkpoint", "load_parameters", "load_state", "progress", "save_checkpoint"]

CHECKPOINTS = "checkpoints"  # in a run's folder
CHECKPOINT = "parameters.safetensors"
STATE = "state.pt"


def save_checkpoint(output: Path, step: int, model: TunedModel, optimizer: Optimizer, rewards: WeightedRewards) -> None:
    """Everything that a run needs to go on after `step` optimizer steps. Older checkpoints are removed once this one is
    whole.

    Every process calls it, for shards are gathered from all; the main one writes.
    """
    averages = None if model.ema is None else model.ema.state_dict()
    tensors = gathered(dict(model.masters))
    state = gathered({"optimizer": optimizer.state_dict(), "ema": averages, "rewards": rewards.state_dict()})
    if not process_state().is_main_process:
        return
    folder = output / CHECKPOINTS / f"step-{step:06d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as scratch:
        scratch.mkdir()
        save_file({name: p.contiguous() for name, p in tensors.items()}, scratch / CHECKPOINT)
        torch.save(state, scratch / STATE)
        (scratch / "step.json").write_text(json.dumps({"step": step, "processes": process_state().num_processes}))
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other)


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has one."""
    return max((output / CHECKPOINTS).glob("step-*"), default=None)


def progress(folder: Path) -> dict[str, int]:
    """{"step": optimizer steps done, "processes": that took them} of a checkpoint. Raises OSError when it is
    damaged.
    """
    try:
        return json.loads((folder / "step.json").read_text())
    except ValueError as error:
        raise damaged(folder, error) from error


def load_parameters(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, on the CPU. Raises OSError when it is damaged."""
    try:
        return load_file(folder / CHECKPOINT)
    except SafetensorError as error:
        raise damaged(folder, error) from error


def load_state(folder: Path) -> dict:
    """What a checkpoint holds beside the parameters, on the CPU: the main process wrote it, from a device that this one
    may not have.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(folder, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def load_checkpoint(folder: Path, model: TunedModel, optimizer: Optimizer, rewards: WeightedRewards) -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the number of steps done. Raises OSError when it is
    damaged.
    """
    saved, masters = load_parameters(folder), model.masters
    if saved.keys() != masters.keys():
        raise ValueError(
            f"{folder} holds other parameters than this config trains: {len(saved)} saved, {len(masters)} expected"
        )
    assign(masters, saved)
    assign(model.parameters, masters)
    state, trained = load_state(folder), list(masters.values())
    for index, moments in state["optimizer"]["state"].items():
        p = trained[index]
        whole = {key: value for key, value in moments.items() if torch.is_tensor(value) and value.shape == p.shape}
        moments.update({key: shard_like(p, value) for key, value in whole.items()})
    optimizer.load_state_dict(state["optimizer"])
    if model.ema is not None:
        shadows = zip(trained, state["ema"]["shadow_params"], strict=True)
        state["ema"]["shadow_params"] = [shard_like(p, shadow) for p, shadow in shadows]
        model.ema.load_state_dict(state["ema"])
    rewards.load_state_dict(state["rewards"])
    return progress(folder)["step"]


def damaged(folder: Path, error: Exception | str) -> OSError:
    return OSError(
        f"the checkpoint {folder} is damaged ({error}): delete it to resume from the first step, or restore it from a "
        "copy"
    )
