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
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowbp import log
from flowbp.config import ConfigError, RunConfig, changed, dump
from flowbp.config.loading import CONFIG, SEAL, read, sealed
from flowbp.given import cut, digest_files, digest_text, inside
from flowbp.runtime import files
from flowbp.runtime.checkpoint import CHECKPOINTS, LORA, TRANSFORMER, latest_checkpoint, progress, prune
from flowbp.runtime.console import is_main

METRICS, BEST, VALIDATION, TENSORBOARD = "metrics.jsonl", "best", "validation", "tensorboard"
MARK = ".flowbp"  # in a folder that a command wrote; it holds the name of the command

Values = Mapping[str, np.ndarray]  # scores [n] float64 by metric


class RunFolder:
    """The folder of one run. Every process of the run has this object, but only that of the main process writes."""

    def __init__(self, path: Path):
        self.path, self.writes = path, is_main()

    def locked(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder during the block, as the function does."""
        return locked(self.path, "trains", "output=")

    # -- before training ---------------------------------------------------------------------------------------------

    def check(self, config: RunConfig, resume: bool, overwrite: bool, processes: int = 1) -> None:
        """Raise unless the folder is empty or absent, or holds a run that a switch says to resume or to replace.

        processes: that the run will have, where no launcher has said so yet.
        """
        path = self.path
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: continue the run, or start it afresh")
        if not path.exists() or (path.is_dir() and not contents(path)):
            return
        if not is_run(path):
            run = f"a run of flowbp (which has a {CONFIG} of its own and {METRICS})"
            raise FileExistsError(f"{path} exists and is not {run}: choose another output=")
        if resume:
            self._check_resume(config, processes)
        elif not overwrite:
            switches = "pass --resume to go on, --overwrite to start afresh, or another output="
            raise FileExistsError(f"{path} already holds a run: {switches}")

    def _check_resume(self, config: RunConfig, processes: int) -> None:
        """Raise if the run trained otherwise than `config` says, or on other processes."""
        path, new, last = self.path, config.model_dump(mode="json"), latest_checkpoint(self.path)
        about = progress(last) if last is not None else {}
        # What a checkpoint says it was trained with stands above a file that may have been changed since.
        old = about.get("config") or read(path / CONFIG)[0]
        if "sigmas" not in (old.get("rollout") or {}):
            cause = "was trained by flowbp 0.1, whose noise levels were not the published ones, and cannot go on"
            way_out = f"its weights still evaluate (flowbp eval {shlex.quote(str(path))})"
            raise ValueError(f"{path} {cause}; {way_out}: to train afresh, choose another output=")
        with suppress(ConfigError, ValueError):  # a key that is newer than the run has its default
            old = RunConfig.model_validate(old).model_dump(mode="json")
        found = changed({**old, "output": new["output"]}, new)  # the folder may have moved
        if found.keys() - {"steps"} or new["steps"] < old.get("steps", 0):
            changes = ", ".join(f"{key} from {cut(was)} to {cut(now)}" for key, (was, now) in found.items())
            rule = "a resumed run keeps its config (steps alone may grow), and this one changes"
            raise ValueError(f"{rule} {changes}: train from {path}, or choose another output=")
        now = int(os.environ.get("WORLD_SIZE", processes))
        if (before := about.get("processes", now)) != now:
            rule = "a step's samples are processes x batch_size x accumulate, and a resumed run keeps them"
            many = f"{before} process{'es' if before > 1 else ''}"
            raise ValueError(f"{last} is of {many}, and this run has {now}: {rule}. Start {before}")

    def open(self, config: RunConfig, overwrite: bool = False) -> None:
        """Write the resolved config and the environment, once `check` has passed. Metrics are appended to.

        overwrite: remove what an older run wrote here, and nothing else.
        """
        from flowbp.runtime.distributed import on_main
        from flowbp.runtime.environment import ENVIRONMENT, environment

        # All that a run leaves in its folder beside CONFIG and METRICS, as patterns: in this order it is emptied, so
        # that what a kill leaves is a run that goes on as it would have, from its first step.
        written = (
            *(CHECKPOINTS, VALIDATION, BEST, LORA, TRANSFORMER, TENSORBOARD, ENVIRONMENT, "evaluation.json"),
            *("validation.json", "scores_*.csv", "samples_*.png", "plan.png", "report.html", files.LEFT),
        )

        def prepare() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            for child in [child for pattern in written for child in self.path.glob(pattern)] if overwrite else ():
                files.remove(child)
            self.write(CONFIG, sealed(dump(config)))
            if overwrite or not (self.path / METRICS).is_file():
                self.write(METRICS, "")
            self.write(ENVIRONMENT, files.as_json(environment()))

        on_main(prepare)

    def forget_after(self, done: int) -> None:
        """Drop what was logged and validated after step `done`, that of the checkpoint from which the run resumes, and
        checkpoints that a kill kept from being removed.

        Without a checkpoint `done` is 0, and nothing is kept: no record says that it is whole.
        """
        from flowbp.runtime.distributed import on_main

        def forget() -> None:
            rows = read_metrics(self.path) if done else []
            self.write(METRICS, "".join(line for line, row in rows if row["step"] <= done))
            for step, file in self._validations().items():
                if step > done or not done:
                    file.unlink()
            if done:
                prune(self.path, done)

        on_main(forget)

    def record(self, config: RunConfig) -> dict[str, Any]:
        """What a checkpoint remembers of the run: its config, and SHA-256 of all that it logged and validated so far.

        {"config": nested, "files": {name: SHA-256}}
        """
        if not self.writes:
            return {}
        files.sync(self.path / METRICS)
        return {"config": config.model_dump(mode="json"), "files": self._digests()}

    def check_record(self, checkpoint: Path) -> None:
        """Raise OSError if a file that `checkpoint` remembers has changed since. One that was deleted is told."""
        about = progress(checkpoint)
        found = self._digests(about["step"])
        for name, digest in about.get("files", {}).items():
            if name in found and found[name] != digest:
                way_out = f"{'empty' if name == METRICS else 'delete'} it to go on without it"
                cause = f"it has changed since {checkpoint} was written"
                raise OSError(f"{self.path / name} is damaged: {cause}. Restore it from a copy, or {way_out}")
            if name not in found and self.writes:
                log.warning("%s is gone: the run goes on without what it held", self.path / name)

    def check_config(self) -> None:
        """Raise OSError where CONFIG is another run's: the newest checkpoint remembers the run's own.

        Steps may have grown since, and the folder may have moved. A config without its seal was changed on purpose.
        """
        file, last, trained = self.path / CONFIG, latest_checkpoint(self.path), None
        with suppress(OSError):  # finished weights are of use without their checkpoints
            trained = progress(last).get("config") if last is not None else None
        if isinstance(trained, dict) and file.read_bytes().startswith(SEAL.encode()):
            own = read(file)[0]
            if found := changed({**trained, "output": own.get("output"), "steps": own.get("steps")}, own):
                changes = ", ".join(f"{key} {cut(was)}, not {cut(now)}" for key, (was, now) in found.items())
                raise OSError(f"{file} is another run's: {last} was trained with {changes}. Restore it from a copy")

    def _digests(self, done: float = float("inf")) -> dict[str, str]:
        """SHA-256 by name of metrics.jsonl, unless it is empty, and of the validation files, as after step `done`."""
        logged = "".join(line for line, row in read_metrics(self.path) if row["step"] <= done)
        held = (self.path / METRICS).stat().st_size  # a cut file may hold no whole row, and is not empty
        digests = {METRICS: digest_text(logged)} if held else {}
        kept = [file for step, file in self._validations().items() if step <= done]
        return digests | {f"{VALIDATION}/{file.name}": digest_files([file]) for file in kept}

    # -- while training ----------------------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a step's row to metrics.jsonl; a number that is not finite becomes null."""
        if self.writes:
            with files.writing(self.path / METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(files.as_json(row, indent=None))

    def track(self, accelerator: Any, values: Mapping[str, Any], step: int) -> None:
        """Show values of a step to TensorBoard, whose thread tells an error of the disk at the next call."""
        with files.writing(self.path / TENSORBOARD):
            accelerator.log(dict(values), step=step)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all steps so far."""
        return [row for _, row in read_metrics(self.path)]

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the run, whole or not at all."""
        if self.writes:
            files.write_file(self.path / name, content)

    def keep_validation(self, step: int, values: Values, best: bool = False) -> None:
        """Keep the scores of the weights after `step` steps. best: they are those that were just saved as `BEST`."""
        if self.writes:
            import torch

            from flowbp.runtime.tensors import write_tensors

            file = self.path / VALIDATION / f"{files.step_name(step)}.safetensors"
            file.parent.mkdir(exist_ok=True)
            columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in values.items()}
            write_tensors(file, columns, {BEST: self._digest_of_best()} if best else {})

    def validations(self) -> dict[int, Values]:
        """All scores that were kept, by step. The main process reads them for all. Raises OSError if one is damaged."""
        from accelerate.utils import broadcast_object_list

        from flowbp.runtime.tensors import read_tensors

        found = {step: read_tensors(file)[0] for step, file in self._validations().items()} if self.writes else None
        tables: Any = broadcast_object_list([found])[0]
        return {step: {name: column.numpy() for name, column in table.items()} for step, table in tables.items()}

    def check_best(self, step: int | None) -> None:
        """Raise OSError unless `BEST` holds what was saved there after `step` steps."""
        if self.writes and step is not None:
            from flowbp.runtime.tensors import read_tensors

            _, about = read_tensors(self._validations()[step])
            if about.get(BEST) != self._digest_of_best():
                cause = "they were damaged, deleted or replaced. All else of this run is whole"
                raise OSError(f"{self.path / BEST} does not hold the weights of the best step, {step}: {cause}")

    def _digest_of_best(self) -> str:
        folder = self.path / BEST
        kept = [*folder.glob(LORA), *folder.glob("step.json"), *sorted(folder.glob(f"{TRANSFORMER}/*"))]
        return digest_files(kept)

    def _validations(self) -> dict[int, Path]:
        return files.by_step(self.path / VALIDATION, ".safetensors")


@contextmanager
def told_at_the_next_call() -> Iterator[None]:
    """TensorBoard's thread hands an error of the disk to the next call of `RunFolder.track`. Python's own traceback of
    the thread would be a second message of it.
    """
    before = threading.excepthook
    threading.excepthook = lambda event: None if issubclass(event.exc_type, OSError) else before(event)
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def locked(folder: Path, does: str, option: str) -> Iterator[None]:
    """Keep out of `folder` during the block whoever asks for the same. It is made if need be, with the folders above
    it, and removed if it stays empty. The main process locks for all.

    The kernel holds the lock, so that a killed process leaves none. Raises FileExistsError while another process has
    it. does: what that process does there. option: which names another folder.
    """
    if not is_main():
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another {option}")
    made = [folder, *(parent for parent in folder.parents if not parent.exists())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror}): choose another {option}") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to: choose another {option}, or change its permissions")
    try:
        with files.opened(folder) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holds = f"another process {does} in {folder} right now"
                raise FileExistsError(f"{holds}: wait for it, or choose another {option}") from None
            yield
    finally:
        with suppress(OSError):  # it holds something
            for path in made:
                path.rmdir()


def read_metrics(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, row) of each step of a run. A last line without an end is left out: a kill cut it, or it is being written.

    Raises OSError, which names the line, if the file is damaged.
    """
    file, rows = folder / METRICS, []
    try:
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    raise TypeError("its step is no number")
                rows.append((line.decode(), row))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OSError(f"{file} is damaged in line {len(rows) + 1}: {cut(error)}. Restore it from a copy") from error
    return rows


def is_run(folder: Path) -> bool:
    """Whether a run wrote `folder`: it holds metrics, and a config.yaml that names all that a run must name; or nothing
    but a config.yaml that names every key, as a run that was killed while it started.
    """
    started = (folder / METRICS).is_file()
    if not (folder / CONFIG).is_file() or not (started or contents(folder) == {CONFIG}):
        return False
    needed = {name for name, field in RunConfig.model_fields.items() if field.is_required() or not started}
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        keys = yaml.safe_load((folder / CONFIG).read_text())
        return isinstance(keys, dict) and needed <= keys.keys()
    return False


def check_run(folder: Path) -> None:
    """Raise FileNotFoundError for a folder that holds no run, or a run that has not started."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: pass the folders of runs")
    for file in (CONFIG, METRICS):
        if not inside(folder, file).is_file():
            way_out = "pass the folders that flowbp train wrote"
            raise FileNotFoundError(f"{folder} holds no {file}, so it is no run: {way_out}")


def check_whole(folder: Path) -> None:
    """Raise OSError where a run's config is another's, or a file is gone that the SHA256SUMS beside it lists."""
    if (folder / CONFIG).is_file():
        RunFolder(folder).check_config()
    for sums in (*folder.glob(files.SUMS), *folder.glob(f"*/{files.SUMS}")):
        for line in sums.read_text(errors="replace").splitlines():
            if not (file := sums.parent / cut(line.partition("  ")[2])).exists():
                raise FileNotFoundError(f"{file} is missing, and {files.SUMS} lists it: restore it from a copy")


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many of them as it takes to tell them apart. Raises ValueError for equal
    folders, and for fewer than two.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two runs or more, got {len(folders)}")
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = dict.fromkeys(str(folder) for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1)
    raise ValueError(f"a run is compared with itself: {', '.join(twice)}; name each folder once")


def contents(folder: Path) -> set[str]:
    """The names of what lies in `folder`, but for what a killed write left."""
    return {path.name for path in folder.glob("*") if not path.match(files.LEFT)}


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
    check_mark(folder, command)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_file(folder / MARK, command)


def check_mark(folder: Path, command: str) -> None:
    """Raise FileExistsError as `mark_folder` does."""
    ours = (folder / MARK).is_file() and (folder / MARK).read_text() == command
    if not ours and folder.exists() and (not folder.is_dir() or contents(folder)):
        way_out = "choose another --out, or an empty folder"
        raise FileExistsError(f"{folder} holds what {command} did not write there: {way_out}")
