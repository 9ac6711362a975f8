"""Files and folders that are whole or not there.

Everything is written under a scratch name beside its place and moved there in one step. Its bytes reach the disk before
its name does, so that a kill, a full disk or a power cut leaves either the old one or the new one.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SCRATCH = ".partial"  # ends the name of what a kill leaves; it begins with a dot


@contextmanager
def replacing(path: Path, cache: bool = False) -> Iterator[Path]:
    """A scratch path for the block to write, as a file or a folder, which then takes the place of `path`.

    If the block raises, `path` stays as it was and the scratch is removed. A kill leaves the scratch, named
    `.NAME.partial`, for the next write to remove.

    cache: for files that several processes may write at once, and whose readers check them. Each write has a scratch
    of its own, and none waits for the disk.

    Raises OSError if `path` cannot be written, also where safetensors and torch raise errors of their own, as they do
    on a full disk.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}{SCRATCH}" if cache else f".{path.name}{SCRATCH}")
    remove(scratch)
    try:
        with writing(path):
            yield scratch
            if not cache:
                flush(scratch)
            old = path.with_name(f".{path.name}.old{SCRATCH}")
            if path.is_dir():  # one folder cannot replace another
                remove(old)
                os.replace(path, old)
            os.replace(scratch, path)
            remove(old)
            if not cache:
                sync(path.parent)
    finally:
        remove(scratch)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Every error of a full disk becomes an OSError that names `path`: the system names no file where a write fails,
    and safetensors and torch raise errors of their own.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{path} cannot be written: {error}. Its disk may be full") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; a number that is not finite becomes null."""
    write_file(path, json.dumps(without_nan(value), indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, which names it, if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged, or no JSON: {error}") from error


def without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def step_name(step: int) -> str:
    """The name, without its suffix, of what a run keeps of the weights after `step` optimizer steps."""
    return f"step-{step:06d}"


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What lies in `folder` under `step_name` and `suffix`, by step, increasing. All other names are a user's own."""
    names = {path: path.name.removeprefix("step-").removesuffix(suffix) for path in folder.glob(f"step-*{suffix}")}
    found = {int(digits): path for path, digits in names.items() if digits.isdecimal()}
    return {step: found[step] for step in sorted(found) if found[step].name == step_name(step) + suffix}


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, if it is there. A kill leaves no half of a folder under its
    name.
    """
    if path.is_dir() and not path.is_symlink():
        gone = path if path.match(f".*{SCRATCH}") else path.with_name(f".{path.name}.gone{SCRATCH}")
        if gone != path:
            remove(gone)
            os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or all that a folder holds, is on the disk."""
    for part in (*(path.rglob("*") if path.is_dir() else ()), path):
        sync(part)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
