"""Files and folders that are whole or not there.

Everything is written in a scratch folder beside its place and moved there in one step. Its bytes reach the disk before
its name does, so that a kill, a full disk or a power cut leaves either the old one or the new one.
"""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from safetensors import SafetensorError

from flowbp.given import digest_files

SCRATCH = ".partial"
LEFT = f".*.{'[a-z0-9_]' * 8}{SCRATCH}"  # what a kill leaves
SUMS = "SHA256SUMS"  # of a folder's other files, as `sha256sum -c` reads it


@contextmanager
def replacing(path: Path, cache: bool = False) -> Iterator[Path]:
    """A scratch path for the block to write, as a file or a folder, which then takes the place of `path`.

    If the block raises, `path` stays as it was and the scratch is removed. The next write removes what a kill left.

    cache: for files that need not outlast a power cut, as their readers check them. The write does not wait for the
    disk, and leaves `remove_left` to the owner of the folder, which may be large.

    Raises OSError if `path` cannot be written, also where safetensors and torch raise errors of their own, as they do
    on a full disk.
    """
    if not cache:
        remove_left(path.parent, glob.escape(path.name))
    with writing(path), scratch_folder(path) as folder:
        scratch = folder / path.name
        yield scratch
        for part in (*scratch.rglob("*"), scratch):
            if part.is_file():  # safetensors writes for this user alone
                part.chmod(0o666 & ~umask())
            if not cache:
                sync(part)
        if path.is_dir():  # one folder cannot replace another
            os.replace(path, folder / "old")
        os.replace(scratch, path)
        if not cache:
            sync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder `.NAME.xxxxxxxx.partial` beside `path`, which is removed after the block with all that it holds.

    Its name is random and only this user may enter it, so that nobody can plant a link where the block will write. It
    is locked, and the kernel frees the lock of a killed process.
    """
    folder = Path(tempfile.mkdtemp(SCRATCH, f".{path.name}.", path.parent))
    with opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder)


def remove_left(folder: Path, name: str = "*") -> None:
    """Remove the scratch folders that killed writes of files called `name`, a pattern, left in `folder`.

    Those that a live process has locked stay, and so does all that is no folder.
    """
    for left in folder.glob(LEFT.replace("*", name)):
        # An error: it is locked, a link, a file, or removed in this moment by another process.
        with suppress(OSError), opened(left, os.O_DIRECTORY | os.O_NOFOLLOW) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.listdir(handle):  # an empty one may be of a process that has yet to lock it
                shutil.rmtree(left)


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


def as_json(value: Any, indent: int | None = 1) -> str:
    """The text of a JSON file, or with indent=None a line of one; a number that is not finite becomes null."""
    return to_json(value, indent=indent, inf_nan_mode="null").decode() + "\n"


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, which names it, if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged, or no JSON: {error}") from error


def digest_line(file: Path) -> str:
    return f"{digest_files([file])}  {file.name}\n"


def seal(folder: Path) -> None:
    """Write the digests of a folder's files, which are checked whenever one is read."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    (folder / SUMS).write_text("".join(map(digest_line, files)))


def check_seal(file: Path) -> None:
    """Raise ValueError if a file has changed since its folder was sealed. A folder of 0.1 has no digests."""
    sums = file.with_name(SUMS)
    if sums.exists() and digest_line(file) not in sums.read_text(errors="replace").splitlines(keepends=True):
        raise ValueError(f"{file} is damaged: it or {SUMS} has changed since it was written")


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
        with scratch_folder(path) as folder:
            os.replace(path, folder / path.name)
    else:
        path.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that this process gives no new file. The system tells them when they are set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file, or the list of what a folder holds, is on the disk."""
    with opened(path) as handle:
        os.fsync(handle)


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    """The system's handle of a file or a folder that is read, closed after the block. flags: more of `os.open`."""
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        yield handle
    finally:
        os.close(handle)
