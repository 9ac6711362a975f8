"""The folder of a run: what lies in it, who may write there, and how a run goes on.

config.yaml                          the resolved config
environment.json                     versions, commit, device
metrics.jsonl, tensorboard/          a row a step
checkpoints/step-000100/             all that resuming needs
validation/step-000050.safetensors   scores of the held-out samples, if `evaluation.every` asks for them
best/                                the weights of the best step by `evaluation.best`
pytorch_lora_weights.safetensors     the trained weights; with tuning.mode=full transformer/
report.html                          the report, with plan.png, samples_*.png, scores_*.csv, evaluation.json and
                                     validation.json
"""

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from accelerate.utils import broadcast_object_list
from safetensors.numpy import load_file, save_file

from flowbp.config import RunConfig, changed, dump
from flowbp.config.loading import CONFIG
from flowbp.foreign import cut
from flowbp.runtime.checkpoint import CHECKPOINTS, latest_checkpoint, progress
from flowbp.runtime.distributed import on_main, process_state
from flowbp.runtime.environment import ENVIRONMENT, environment
from flowbp.runtime.files import LEFT, by_step, remove, replacing, step_name, without_nan, write_file, write_json
from flowbp.runtime.weights import LORA, TRANSFORMER, save_weights

if TYPE_CHECKING:  # importing it takes seconds, and whoever checks a command's input does without
    from flowbp.backbones import Backbone

METRICS = "metrics.jsonl"
BEST = "best"
VALIDATION = "validation"
MARK = ".flowbp"  # in a folder that a command wrote; it holds the name of the command
# All that a run leaves in its folder beside CONFIG and METRICS, as patterns: in this order it is emptied, so that what
# a kill leaves is a run that goes on as it would have, from its first step.
WRITTEN = (
    *(CHECKPOINTS, VALIDATION, BEST, LORA, TRANSFORMER, "tensorboard", ENVIRONMENT, "evaluation.json"),
    *("validation.json", "scores_*.csv", "samples_*.png", "plan.png", "report.html", LEFT),
)

Values = Mapping[str, np.ndarray]  # scores [n] float64 by metric


class RunFolder:
    """The folder of one run. Every process of the run has this object, but only that of the main process writes."""

    def __init__(self, path: Path):
        self.path, self.writes = path, process_state().is_main_process

    # -- before training ---------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder during the block. It is made if need be, and removed if it stays empty.

        The kernel holds the lock, so that a killed process leaves none. Raises FileExistsError while another process
        has it.
        """
        if not self.writes:
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file: choose another output=")
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(
                f"{self.path} cannot be written to: choose another output=, or change its permissions"
            )
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holds = f"another process trains in {self.path} right now"
                raise FileExistsError(f"{holds}: wait for it, or choose another output=") from None
            yield
        finally:
            os.close(folder)
            with suppress(OSError):  # it holds something
                self.path.rmdir()

    def check(self, config: RunConfig, resume: bool, overwrite: bool) -> None:
        """Raise unless the folder is empty or absent, or holds a run that a switch says to resume or to replace."""
        path = self.path
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: continue the run, or start it afresh")
        if not path.exists() or (path.is_dir() and not contents(path)):
            return
        if not is_run(path):
            run = f"a run of flowbp (which has a {CONFIG} of its own and {METRICS})"
            raise FileExistsError(f"{path} exists and is not {run}: choose another output=")
        if resume:
            self._check_resume(yaml.safe_load((path / CONFIG).read_text()), yaml.safe_load(dump(config)))
        elif not overwrite:
            switches = "pass --resume to go on, --overwrite to start afresh, or another output="
            raise FileExistsError(f"{path} already holds a run: {switches}")

    def _check_resume(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Raise if the run trained otherwise than `new` says: with another config, or on other processes."""
        path = self.path
        if "sigmas" not in (old.get("rollout") or {}):
            raise ValueError(
                f"{path} was trained by flowbp 0.1, whose noise levels were not the published ones, and cannot go on; "
                f"its weights still evaluate (flowbp eval {shlex.quote(str(path))}): to train afresh, choose another "
                "output="
            )
        found = changed({**old, "output": new["output"]}, new)  # the folder may have moved
        if found.keys() - {"steps"} or new["steps"] < old.get("steps", 0):
            changes = ", ".join(f"{key} from {cut(was)} to {cut(now)}" for key, (was, now) in found.items())
            raise ValueError(
                f"a resumed run keeps its config (steps alone may grow), and this one changes {changes}: train from "
                f"{path}, or choose another output="
            )
        last = latest_checkpoint(path)
        now = process_state().num_processes
        if last is not None and (before := progress(last)["processes"]) != now:
            raise ValueError(
                f"{last} is of {before} process{'es' if before > 1 else ''}, and this run has {now}: a step's samples "
                f"are processes x batch_size x accumulate, and a resumed run keeps them. Start {before}"
            )

    def open(self, config: RunConfig, overwrite: bool = False) -> None:
        """Write the resolved config and the environment, once `check` has passed. Metrics are appended to.

        overwrite: remove what an older run wrote here, and nothing else.
        """

        def prepare() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            for child in [child for pattern in WRITTEN for child in self.path.glob(pattern)] if overwrite else ():
                remove(child)
            self.write(CONFIG, dump(config))
            if overwrite or not (self.path / METRICS).is_file():
                self.write(METRICS, "")
            write_json(self.path / ENVIRONMENT, environment())

        on_main(prepare)

    def forget_after(self, done: int) -> None:
        """Drop what was logged and validated after step `done`, that of the checkpoint from which the run resumes."""

        def forget() -> None:
            lines = (self.path / METRICS).read_text().splitlines(keepends=True)
            self.write(METRICS, "".join(lines[:done]))
            for step, file in self._validations().items():
                if step > done:
                    file.unlink()

        on_main(forget)

    # -- while training ----------------------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a step's row to metrics.jsonl; a number that is not finite becomes null."""
        if self.writes:
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(without_nan(row)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all steps so far."""
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the run, whole or not at all."""
        if self.writes:
            write_file(self.path / name, content)

    def write_json(self, name: str, value: Any) -> None:
        """The same for a value as JSON."""
        if self.writes:
            write_json(self.path / name, value)

    def save_weights(self, backbone: "Backbone", name: str = "") -> None:
        """Write the backbone's weights into the run's folder, or into `name` in it. Every process calls it."""
        save_weights(backbone, self.path / name, write=self.writes)

    def keep_validation(self, step: int, values: Values) -> None:
        """Keep the scores of the weights after `step` steps."""
        if self.writes:
            file = self.path / VALIDATION / f"{step_name(step)}.safetensors"
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as scratch:
                save_file({name: np.ascontiguousarray(column) for name, column in values.items()}, scratch)

    def validations(self) -> dict[int, Values]:
        """All scores that were kept, by step. The main process reads them for all."""
        found = [{step: load_file(file) for step, file in self._validations().items()} if self.writes else None]
        return broadcast_object_list(found)[0]  # pyright: ignore[reportReturnType]

    def _validations(self) -> dict[int, Path]:
        return by_step(self.path / VALIDATION, ".safetensors")


def is_run(folder: Path) -> bool:
    """Whether a run wrote `folder`: it holds metrics, and a config.yaml that names all that a run must name; or nothing
    but a config.yaml that names every key, as a run that was killed while it started.
    """
    started = (folder / METRICS).is_file()
    if not (folder / CONFIG).is_file() or not (started or contents(folder) == {CONFIG}):
        return False
    try:
        keys = yaml.safe_load((folder / CONFIG).read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    needed = {name for name, field in RunConfig.model_fields.items() if field.is_required() or not started}
    return isinstance(keys, dict) and needed <= keys.keys()


def contents(folder: Path) -> set[str]:
    """The names of what lies in `folder`, but for what a killed write left."""
    return {path.name for path in folder.iterdir() if not path.match(LEFT)}


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
    """Make `folder` the output of `command`, such as "flowbp eval", which may then replace what it wrote there before.

    Raises FileExistsError for a folder that holds anything and that this command did not make.
    """
    mark = folder / MARK
    if mark.is_file() and mark.read_text() == command:
        return
    if folder.exists() and (not folder.is_dir() or contents(folder)):
        raise FileExistsError(
            f"{folder} holds what {command} did not write there: choose another --out, or an empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(mark, command)
