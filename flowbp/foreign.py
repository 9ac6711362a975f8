"""Files that anybody may have written: how much of them is read, and how much of what they hold a message shows."""

import hashlib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST = 2**28  # characters of a text file

BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 3, 60, 60, 60


def short(value: Any) -> str:
    """repr(value) in at most 80 characters, made at the cost of as many: a value from a file may have any size."""
    try:
        text = BRIEF.repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        text = f"<{type(value).__name__} of a huge number>"
    return cut(text)


def cut(value: Any, most: int = 80) -> str:
    """str(value), of which `most` characters are shown."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises ValueError for a link that leads out of it, whose target the folder's author
    could not read but whoever runs this can.
    """
    if not (path := folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link that leads out of {folder}: put a copy of the file in its place")
    return path


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a UTF-8 file, with every line end as a line feed. Raises ValueError for other bytes, and for more
    than `most` characters, of which no more are read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(most + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if len(text) > most:
        raise ValueError(f"{path} is longer than the {most:,} characters that are read: give a shorter file")
    return text


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook` of `json.loads`. Raises ValueError for a key that stands there twice,
    of which the last would win.
    """
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands there twice: {short([key for key, _ in pairs])}")
    return found


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
