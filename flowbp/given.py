"""What a user or a stranger has given, as files, values and names: how much of it is read, how much of it a message
shows, which known name is the nearest to a misspelt one, and what "module:attribute" stands for.
"""

import difflib
import hashlib
import importlib
import reprlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

LARGEST = 2**28  # characters of a text file
IMAGE_STATISTICS = ("saturation", "high_frequency", "diversity")  # a config knows them without torch
FOLDERS: list[Path] = []  # where `find` looks after the working folder

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


@cache
def read_data(module: str, name: str) -> Any:
    """What the YAML file `name` of flowbp holds, which lies beside the file `module`; it is read once."""
    import yaml  # the engine does without

    return yaml.safe_load(Path(module).with_name(name).read_text(encoding="utf-8"))


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook` of `json.loads`. Raises ValueError for a key that stands there twice,
    of which the last would win.
    """
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands there twice: {short([key for key, _ in pairs])}")
    return found


def digest_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of `paths`, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...? ', or nothing where no name is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def find(kind: str, name: str) -> Any:
    """The object that "module:attribute" names, whose module is run. Modules of the working folder are found as well,
    because a console script has the folder of the script in its place. Raises ValueError if there is no such module or
    attribute.

    The folders are added to Python's path here and nowhere else, so that the modules that lie beside a config are out
    of reach until code of one's own is asked for.
    """
    module, _, attribute = name.partition(":")
    if not module.startswith("flowbp."):
        places = [str(folder.resolve()) for folder in (Path(), *FOLDERS)]
        sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        places = f"modules are searched in {Path().resolve()}, the config's folder, and the installed packages"
        raise ValueError(f"cannot import the {kind} {short(name)}: {cut(error, 400)}; {places}") from error
