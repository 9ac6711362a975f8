"""Names that a user types: the nearest known one to a misspelt one, what "module:attribute" stands for, and which are
taken by the metrics of `flowbp.image_statistics`.
"""

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowbp.foreign import cut, short

IMAGE_STATISTICS = ("saturation", "high_frequency", "diversity")  # a config knows them without torch
FOLDERS: list[Path] = []  # where `find` looks after the working folder


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
