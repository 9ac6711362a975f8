"""The folder of a run, or of another command's results: what may be written there, by whom, and how a run goes on."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from flowbp.config import RunConfig, changed
from flowbp.runtime.checkpoint import CHECKPOINTS, latest_checkpoint, progress
from flowbp.runtime.distributed import process_state
from flowbp.runtime.files import remove, write_file
from flowbp.runtime.weights import LORA, TRANSFORMER

__all__ = ["check_run", "how_to_go_on", "is_run", "keep_first_lines", "locked", "mark_folder", "open_run"]

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
BEST = "best"
MARK = ".flowbp"  # in a folder that a command wrote, with the command's name
WRITTEN = (  # all that a run leaves in its folder, as patterns
    *(CONFIG, METRICS, LORA, TRANSFORMER, BEST, CHECKPOINTS, "validation", "tensorboard", "environment.json", "evaluation.json"),
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
def locked(output: Path) -> Iterator[None]:
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
        remove(child)
    (output / METRICS).touch()
    write_file(output / CONFIG, resolved_config)


def how_to_go_on(output: Path) -> str:
    """What to type after a run in `output` was interrupted."""
    if not is_run(output):
        return "Nothing was trained yet"
    found = latest_checkpoint(output)
    done = f"{progress(found)['step']} steps are saved" if found else "No step is saved yet, for want of a checkpoint"
    processes = progress(found)["processes"] if found else int(os.environ.get("WORLD_SIZE", 1))
    more = f" --processes {processes}" if processes > 1 else ""
    return f"{done}; to go on: flowbp train {shlex.quote(str(output))} --resume{more}"


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
    write_file(mark, command)


def keep_first_lines(path: Path, count: int) -> None:
    """Drop the lines that were logged after the checkpoint a run resumes from."""
    if path.is_file():
        write_file(path, "".join(path.read_text().splitlines(keepends=True)[:count]))
