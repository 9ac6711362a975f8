"""Progress on the terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(what: str, unit: str, total: int, done: int = 0, shown: bool = True) -> tqdm:
    """A bar that redraws often on a terminal, and prints rarely where the output goes to a file."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(desc=what, unit=unit, total=total, initial=done, mininterval=interval, disable=not shown)
