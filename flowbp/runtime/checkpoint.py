"""Checkpoints: all that a run needs to go on after a step. A checkpoint is whole or not there."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp.runtime.files import by_step, check_seal, remove, remove_left, replacing, seal, step_name

if TYPE_CHECKING:  # whether a folder holds checkpoints is told without torch
    from torch import Tensor
    from torch.optim import Optimizer

    from flowbp.rewards.weighted import WeightedRewards

LORA, TRANSFORMER = "pytorch_lora_weights.safetensors", "transformer"  # weights as diffusers reads them
CHECKPOINTS = "checkpoints"  # in a run's folder
CHECKPOINT, STATE, PROGRESS = "parameters.safetensors", "state.pt", "step.json"  # in a checkpoint


def save_checkpoint(
    output: Path, step: int, model: Any, optimizer: "Optimizer", rewards: "WeightedRewards", record: Any = None
) -> None:
    """Write all that a run needs to go on after `step` optimizer steps, then remove all checkpoints but it and the one
    before.

    model: a `TunedModel`.  record: what `RunFolder.record` says of the run's other files, for `progress`. Every process
    must call this, because shards are gathered from all. The main process writes.
    """
    import torch
    from safetensors.torch import save_file

    from flowbp.runtime.distributed import gathered, process_state

    averages = None if model.ema is None else model.ema.state_dict()
    tensors = gathered(dict(model.masters))
    state = gathered({"optimizer": optimizer.state_dict(), "ema": averages, "rewards": rewards.state_dict()})
    if not process_state().is_main_process:
        return
    folder = output / CHECKPOINTS / step_name(step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as scratch:
        scratch.mkdir()
        save_file({name: p.contiguous() for name, p in tensors.items()}, scratch / CHECKPOINT)
        torch.save(state, scratch / STATE)
        about = {"step": step, "processes": process_state().num_processes} | (record or {})
        (scratch / PROGRESS).write_text(json.dumps(about))
        seal(scratch)
    prune(output, step)


def prune(output: Path, step: int) -> None:
    """Remove all checkpoints but that of `step` and the one before, and what killed writes left."""
    saved = checkpoints(output)
    before = max((other for other in saved if other < step), default=step)
    for path in [path for other, path in saved.items() if other not in (before, step)]:
        remove(path)
    remove_left(output / CHECKPOINTS)


def checkpoints(output: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, increasing."""
    return {step: path for step, path in by_step(output / CHECKPOINTS).items() if path.is_dir()}


def latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run whose progress can be read; if that of none can, any; None if there is none."""
    newest = None
    for newest in reversed(checkpoints(output).values()):
        with suppress(OSError):
            progress(newest)
            return newest
    return newest


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of `source`. Raises FileNotFoundError if there are none."""
    if source.is_file():
        return [source]
    for names in ((LORA,), (CHECKPOINT, STATE)):
        if (source / names[0]).is_file():
            return [source / name for name in names]
    for folder in (source / TRANSFORMER, source):
        weights = sorted(folder.glob("*.safetensors"))
        if weights and ((folder / "config.json").is_file() or len(weights) == 1):
            return weights
    hint = f", or its checkpoint {unfinished}" if (unfinished := latest_checkpoint(source)) else ""
    wanted = f"pass the folder of a finished run{hint}, or a LoRA file"
    raise FileNotFoundError(f"{source} holds no {LORA}, transformer/ or {CHECKPOINT}: {wanted}")


def progress(folder: Path) -> dict[str, Any]:
    """{"step": optimizer steps done, "processes": that took them, and what `RunFolder.record` says of the run}.

    Raises OSError if the checkpoint is damaged.
    """
    with reading(folder / PROGRESS):
        found = json.loads((folder / PROGRESS).read_text())
        return {"step": found["step"], "processes": found["processes"]} | found


def load_parameters(folder: Path, names: Iterable[str]) -> "dict[str, Tensor]":
    """The trained parameters of a checkpoint, on the CPU. Raises OSError if it is damaged, ValueError if it holds
    others than `names`.
    """
    from safetensors.torch import load_file

    with reading(folder / CHECKPOINT):
        saved = load_file(folder / CHECKPOINT)
    if saved.keys() != (expected := set(names)):
        sizes = f"{len(saved)} saved, {len(expected)} expected"
        raise ValueError(f"{folder} holds other parameters than its config trains: {sizes}")
    return saved


def load_state(folder: Path) -> dict:
    """What a checkpoint holds beside the parameters. Raises OSError if it is damaged.

    It is loaded to the CPU, because the main process wrote it from a device that this process may not have.
    """
    import torch

    with reading(folder / STATE):
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Check the digest of a checkpoint's file, and let errors that come from damage say so, as OSErrors."""
    try:
        check_seal(file)
        yield
    except Exception as error:  # json, safetensors and torch raise whatever damage leads them to
        cause = (str(error) or type(error).__name__).splitlines()[0]
        way_out = "delete it to resume from an earlier step, or restore it from a copy"
        raise OSError(f"the checkpoint {file.parent} is damaged ({cause}): {way_out}") from error


def load_checkpoint(folder: Path, model: Any, optimizer: "Optimizer", rewards: "WeightedRewards") -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the number of steps done. Raises OSError if damaged."""
    from flowbp.runtime.distributed import shard_like
    from flowbp.runtime.tuning import assign

    assign(model.masters, load_parameters(folder, model.masters))
    assign(model.parameters, model.masters)
    state, trained = load_state(folder), list(model.masters.values())
    for index, moments in state["optimizer"]["state"].items():
        p = trained[index]
        whole = {key: value for key, value in moments.items() if getattr(value, "shape", None) == p.shape}
        moments |= {key: shard_like(p, value) for key, value in whole.items()}
    optimizer.load_state_dict(state["optimizer"])
    if model.ema is not None:
        state["ema"]["shadow_params"] = list(map(shard_like, trained, state["ema"]["shadow_params"]))
        model.ema.load_state_dict(state["ema"])
    rewards.load_state_dict(state["rewards"])
    return progress(folder)["step"]
