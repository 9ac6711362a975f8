"""Checkpoints: all that a run needs to go on after a step. A checkpoint is whole or not there."""

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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

CHECKPOINTS = "checkpoints"  # in a run's folder
CHECKPOINT = "parameters.safetensors"
STATE = "state.pt"


def save_checkpoint(
    output: Path, step: int, model: "TunedModel", optimizer: Optimizer, rewards: WeightedRewards
) -> None:
    """Write all that a run needs to go on after `step` optimizer steps, then remove older checkpoints.

    Every process must call it, because shards are gathered from all. The main process writes.
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
    """{"step": optimizer steps done, "processes": that took them} of a checkpoint. Raises OSError if it is damaged."""
    with reading(folder):
        return json.loads((folder / "step.json").read_text())


def load_parameters(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, on the CPU. Raises OSError if it is damaged."""
    with reading(folder):
        return load_file(folder / CHECKPOINT)


def load_state(folder: Path) -> dict:
    """What a checkpoint holds beside the parameters. Raises OSError if it is damaged.

    It is loaded to the CPU, because the main process wrote it from a device that this process may not have.
    """
    with reading(folder):
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Let errors that come from a damaged checkpoint say so, as OSErrors."""
    try:
        yield
    except (ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        cause, way_out = (str(error) or type(error).__name__).splitlines()[0], "or restore it from a copy"
        raise OSError(
            f"the checkpoint {folder} is damaged ({cause}): delete it to resume from the first step, {way_out}"
        ) from error


def load_checkpoint(folder: Path, model: "TunedModel", optimizer: Optimizer, rewards: WeightedRewards) -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the number of steps done. Raises OSError if damaged."""
    saved, masters = load_parameters(folder), model.masters
    if saved.keys() != masters.keys():
        sizes = f"{len(saved)} saved, {len(masters)} expected"
        raise ValueError(f"{folder} holds other parameters than this config trains: {sizes}")
    assign(masters, saved)
    assign(model.parameters, masters)
    state, trained = load_state(folder), list(masters.values())
    for index, moments in state["optimizer"]["state"].items():
        p = trained[index]
        whole = {key: value for key, value in moments.items() if torch.is_tensor(value) and value.shape == p.shape}
        moments |= {key: shard_like(p, value) for key, value in whole.items()}
    optimizer.load_state_dict(state["optimizer"])
    if model.ema is not None:
        shadows = zip(trained, state["ema"]["shadow_params"], strict=True)
        state["ema"]["shadow_params"] = [shard_like(p, shadow) for p, shadow in shadows]
        model.ema.load_state_dict(state["ema"])
    rewards.load_state_dict(state["rewards"])
    return progress(folder)["step"]
