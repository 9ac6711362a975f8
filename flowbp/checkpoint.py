"""What a run writes: its folder, resumable checkpoints, and weights in diffusers' own formats. Nothing is ever half-written."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowbp.backbones import Backbone
from flowbp.config import RunConfig, changed, load
from flowbp.distributed import gathered, laid_out_as, process_state
from flowbp.rewards import Mixture

__all__ = [
    "base_weights",
    "check_run",
    "claimed",
    "export_comfyui",
    "keep_first_lines",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "mark_folder",
    "open_run",
    "replace_file",
    "save_checkpoint",
    "save_weights",
    "weight_files",
]

CONFIG = "config.yaml"
LORA = "pytorch_lora_weights.safetensors"
CHECKPOINT = "parameters.safetensors"
METRICS = "metrics.jsonl"
MARK = ".flowbp"  # in a folder that a command wrote, with the command's name
WRITTEN = (  # all that a run leaves in its folder, as patterns
    *(CONFIG, METRICS, LORA, "transformer", "best", "checkpoints", "validation", "tensorboard", "environment.json", "evaluation.json"),
    *("validation.json", "scores_*.csv", "samples_*.png", "plan.png", "report.html", ".*.partial"),
)


def check_run(output: Path, resolved_config: str, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may write into `output`: an empty or absent folder, or a run that a switch says to resume or to replace."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: continue the run, or start it afresh")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_run(output):
        raise FileExistsError(
            f"{output} exists and is not a run of flowbp (which has a {CONFIG} of its own and {METRICS}): choose another output="
        )
    if not (resume or overwrite):
        raise FileExistsError(f"{output} already holds a run: pass --resume to go on, --overwrite to start afresh, or another output=")
    if resume:
        old, new = (yaml.safe_load(text) for text in ((output / CONFIG).read_text(), resolved_config))
        if "sigmas" not in (old.get("rollout") or {}):
            raise ValueError(
                f"{output} was trained by flowbp 0.1, whose noise levels were not the published ones, and cannot go on; its weights still "
                f"evaluate (flowbp eval {shlex.quote(str(output))}): to train afresh, choose another output="
            )
        found = changed(old, new)
        if found.keys() - {"steps"} or new["steps"] < old.get("steps", 0):
            changes = ", ".join(f"{key} from {was} to {now}" for key, (was, now) in found.items())
            raise ValueError(
                f"a resumed run keeps its config (steps alone may grow), and this one changes {changes}: train from {output}, or "
                "choose another output="
            )
        found = latest_checkpoint(output)
        before, now = found and progress(found)["processes"], process_state().num_processes
        if found and before != now:
            raise ValueError(
                f"{found} is of {before} process{'es' if before > 1 else ''}, and this run has {now}: a step's samples are processes x "
                f"batch_size x accumulate, and a resumed run keeps them. Start {before}"
            )


def is_run(folder: Path) -> bool:
    """Whether a run wrote `folder`: it holds metrics, and a config with all that a run must name. Many a folder has some config.yaml."""
    if not ((folder / CONFIG).is_file() and (folder / METRICS).is_file()):
        return False
    try:
        keys = yaml.safe_load((folder / CONFIG).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    needed = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
    return isinstance(keys, dict) and needed <= keys.keys()


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """The folder of a run, made if need be, for this process alone; it is gone again if it stays empty.

    The claim is the kernel's lock on the folder: a killed process leaves none. Raises FileExistsError while another one holds it.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: choose another output=")
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"{output} cannot be written to: choose another output=, or change its permissions")
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process trains in {output} right now: wait for it, or choose another output=") from None
        yield
    finally:
        os.close(folder)
        with suppress(OSError):  # it holds something
            output.rmdir()


def open_run(output: Path, resolved_config: str, overwrite: bool) -> None:
    """Make the folder of a run, which `check_run` let pass: its resolved config, and metrics to append to.

    overwrite: what an older run wrote there is removed, and nothing else.
    """
    output.mkdir(parents=True, exist_ok=True)
    for child in [child for pattern in WRITTEN for child in output.glob(pattern)] if overwrite else ():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    (output / METRICS).touch()
    replace_file(output / CONFIG, resolved_config)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends without error, and is gone when it does not.

    Raises OSError when a file cannot be written: on a full disk, safetensors and torch raise errors of their own.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{folder} cannot be written: {error}. Its disk may be full") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_checkpoint(output: Path, step: int, parameters: dict[str, Tensor], optimizer, ema, rewards: Mixture, write: bool = True) -> None:
    """Everything that a run needs to go on after `step` optimizer steps. Older checkpoints are removed once this one is whole.

    Every process calls it, for shards are gathered from all; one writes.
    """
    state = {"optimizer": optimizer.state_dict(), "ema": ema and ema.state_dict(), "rewards": rewards.state_dict()}
    tensors, state = gathered((dict(parameters), state))
    if not write:
        return
    folder = output / "checkpoints" / f"step-{step:06d}"
    with written_whole(folder) as scratch:
        save_file({name: p.detach().contiguous() for name, p in tensors.items()}, scratch / CHECKPOINT)
        torch.save(state, scratch / "state.pt")
        (scratch / "step.json").write_text(json.dumps({"step": step, "processes": process_state().num_processes}))
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other)


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has one."""
    return max((output / "checkpoints").glob("step-*"), default=None)


def progress(folder: Path) -> dict[str, int]:
    """{"step": optimizer steps done, "processes": that took them} of a checkpoint. Raises OSError when it is damaged."""
    try:
        return json.loads((folder / "step.json").read_text())
    except ValueError as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> OSError:
    return OSError(f"the checkpoint {folder} is damaged ({error}): delete it to resume from the first step, or restore it from a copy")


def load_parameters(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, on the CPU. Raises OSError when it is damaged."""
    try:
        return load_file(folder / CHECKPOINT)
    except SafetensorError as error:
        raise damaged(folder, error) from error


def how_to_go_on(output: Path) -> str:
    """What to type after a run in `output` was interrupted."""
    if not is_run(output):
        return "Nothing was trained yet"
    found = latest_checkpoint(output)
    done = f"{progress(found)['step']} steps are saved" if found else "No step is saved yet, for want of a checkpoint"
    processes = progress(found)["processes"] if found else int(os.environ.get("WORLD_SIZE", 1))
    more = f" --processes {processes}" if processes > 1 else ""
    return f"{done}; to go on: flowbp train {shlex.quote(str(output))} --resume{more}"


def load_checkpoint(folder: Path, parameters: dict[str, Tensor], optimizer, ema, rewards: Mixture) -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the number of steps done. Raises OSError when it is damaged."""
    saved = load_parameters(folder)
    if saved.keys() != parameters.keys():
        raise ValueError(f"{folder} holds other parameters than this config trains: {len(saved)} saved, {len(parameters)} expected")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(laid_out_as(parameter, saved[name]))
    state, trained = load_state(folder), list(parameters.values())
    for index, moments in state["optimizer"]["state"].items():
        p = trained[index]
        moments.update({key: laid_out_as(p, value) for key, value in moments.items() if torch.is_tensor(value) and value.shape == p.shape})
    optimizer.load_state_dict(state["optimizer"])
    if ema:
        state["ema"]["shadow_params"] = [laid_out_as(p, shadow) for p, shadow in zip(trained, state["ema"]["shadow_params"], strict=True)]
        ema.load_state_dict(state["ema"])
    rewards.load_state_dict(state["rewards"])
    return progress(folder)["step"]


def load_state(folder: Path) -> dict:
    """What a checkpoint holds beside the parameters, on the CPU: the main process wrote it, from a device that this one may not have."""
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(folder, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def save_weights(backbone: Backbone, output: Path, write: bool = True) -> Path:
    """Write the tuned weights: LoRA as `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(output)`; full weights as the folder
    `transformer/`, for `from_pretrained`. Every process calls it, for shards are gathered from all; one writes. Returns the path."""
    denoiser = backbone.denoiser
    if not getattr(denoiser, "peft_config", None):
        state = gathered(denoiser.state_dict())
        if write:
            with torch.device("meta"):
                whole = type(denoiser).from_config(denoiser.config)
            whole.load_state_dict(state, assign=True)
            with written_whole(output / "transformer") as scratch:
                whole.save_pretrained(scratch)
        return output / "transformer"
    from peft import get_peft_model_state_dict

    layers = gathered(get_peft_model_state_dict(denoiser))
    if not write:
        return output / LORA
    adapter = denoiser.peft_config["default"].to_dict()  # says alpha: a file without it is read as alpha = rank
    adapter["target_modules"] = sorted(adapter["target_modules"])
    output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        type(backbone.pipe).save_lora_weights(scratch, transformer_lora_layers=layers, transformer_lora_adapter_metadata=adapter)
        os.replace(Path(scratch, LORA), output / LORA)
    return output / LORA


def export_comfyui(source: Path, target: Path) -> None:
    """Write the LoRA of a run's folder `source` as one file `target` for ComfyUI, which diffusers reads as well.

    ComfyUI knows the layers of all four classes by diffusers' names, but takes alpha = rank where a file has no alpha keys, which diffusers
    does not accept; so alpha / rank is multiplied into lora_B. Raises FileNotFoundError when the run holds no LoRA.
    """
    if not (source / LORA).is_file():
        raise FileNotFoundError(f"{source} holds no {LORA}: pass the folder of a finished run with tuning.mode=lora")
    with safe_open(source / LORA, "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scale = adapter["transformer.lora_alpha"] / adapter["transformer.r"]
    scratch = target.with_name(f".{target.name}.partial")
    save_file({name: value * scale if ".lora_B." in name else value for name, value in tensors.items()}, scratch, {"format": "pt"})
    os.replace(scratch, target)


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The denoiser's weights as its checkpoint has them, on the CPU. Raises ValueError when it was not loaded from one."""
    denoiser = backbone.denoiser
    folder = denoiser.config.get("_name_or_path")
    if not folder:
        raise ValueError("the backbone was not loaded from a folder, so its base weights are gone: set evaluation to null")
    return dict(type(denoiser).from_pretrained(folder, dtype=denoiser.dtype).named_parameters())


def load_weights(backbone: Backbone, source: Path) -> None:
    """Load tuned weights into the backbone: a LoRA file or folder, a run, the folder of a transformer, or one of a run's checkpoints.

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
            raise ValueError(f"{files[0]} is not a LoRA in safetensors: {error}; pass a run, its checkpoint, or a LoRA file") from error
        weights = {name: module.weight.shape for name, module in backbone.denoiser.named_modules() if isinstance(module, nn.Linear)}
        strange = [name for name, shape in saved.items() if weights.get(name) != shape]
        if strange:
            network = type(backbone.denoiser).__name__
            raise ValueError(
                f"{files[0]} belongs to another model: {len(strange)} of its {len(saved)} layers, such as {strange[0]}, "
                f"do not fit this {network}; load it into the backbone that its config.yaml names"
            )
        backbone.pipe.load_lora_weights(folder, weight_name=files[0].name)
        loaded = sum(name.endswith("lora_A") for name, module in backbone.denoiser.named_modules() if isinstance(module, nn.ModuleDict))
        if loaded != len(saved):
            raise ValueError(f"{files[0]} holds {len(saved)} LoRA layers but {loaded} were loaded")


def lora_shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shape [out, in] of the weight that each layer of a LoRA file adds to, by module name."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    layers = [name.removesuffix(down) for name in tensors if name.endswith(down)]
    return {name.removeprefix("transformer."): torch.Size((len(tensors[name + up]), tensors[name + down].shape[1])) for name in layers}


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of `source`: what `load_weights` reads. Raises FileNotFoundError when there are none."""
    if source.is_file():
        return [source]
    for name in (LORA, CHECKPOINT):
        if (source / name).is_file():
            return [source / name] + [source / "state.pt"] * (name == CHECKPOINT)
    for folder in (source / "transformer", source):
        weights = sorted(folder.glob("*.safetensors"))
        if weights and ((folder / "config.json").is_file() or len(weights) == 1):
            return weights
    unfinished = latest_checkpoint(source)
    hint = f", or its checkpoint {unfinished}" if unfinished else ""
    raise FileNotFoundError(
        f"{source} holds no {LORA}, transformer/ or {CHECKPOINT}: pass the folder of a finished run{hint}, or a LoRA file"
    )


def load_training_checkpoint(backbone: Backbone, folder: Path) -> None:
    """Load the weights that a run would have delivered after the checkpoint `folder`: the moving average if it keeps one."""
    from flowbp.tuning import assign, trainable_parameters

    config = folder.parents[1] / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is a checkpoint of a run, but {config}, which says what was trained, is missing")
    saved, parameters = load_parameters(folder), trainable_parameters(backbone, load(config).tuning)
    if saved.keys() != parameters.keys():
        raise ValueError(f"{folder} holds {len(saved)} tensors and {config} trains {len(parameters)}: they belong to different models")
    average = load_state(folder)["ema"]
    assign(parameters, dict(zip(parameters, average["shadow_params"], strict=True)) if average else saved)
    backbone.denoiser.eval()  # the layers of a new adapter drop out


def mark_folder(folder: Path, command: str) -> None:
    """Make `folder` the output of `command`, such as "flowbp eval": what that command wrote there before may be replaced, nothing else is.

    Raises FileExistsError for a folder that holds anything and that this command did not make.
    """
    mark = folder / MARK
    if mark.is_file() and mark.read_text() == command:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds what {command} did not write there: choose another --out, or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(mark, command)


def keep_first_lines(path: Path, count: int) -> None:
    """Drop the lines that were logged after the checkpoint a run resumes from."""
    if path.is_file():
        replace_file(path, "".join(path.read_text().splitlines(keepends=True)[:count]))


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; one that a kill leaves behind is named *.partial."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(scratch, path)
