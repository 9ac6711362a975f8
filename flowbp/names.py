"""Names that a user types: the nearest known one to a misspelt one, and what "module:attribute" stands for."""

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...? ', or nothing where no name is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def search_in(folder: Path) -> None:
    """Let `find` import modules of `folder`, after those of the working folder."""
    if (place := str(folder.resolve())) not in sys.path:
        sys.path.append(place)


def find(kind: str, name: str) -> Any:
    """The object that "module:attribute" names. Modules of the working folder are found as well, because a console
    script has the folder of the script in its place. Raises ValueError if there is no such module or attribute.
    """
    search_in(Path())
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        places = (
            f"modules are searched in {Path().resolve()}, in the folder of the config, and among installed packages"
        )
        raise ValueError(f"cannot import the {kind} {name!r}: {error}; {places}") from error
