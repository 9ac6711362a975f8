"""Prompts: read them, and serve them in an order that depends on the seed and the step alone, so that a resumed run sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["Prompt", "PromptStream", "load_prompts", "sample_seeds"]


class Prompt(NamedTuple):
    text: str
    category: str = ""


def load_prompts(source: str) -> list[Prompt]:
    """Prompts of "shapes:<split>" (train, dev, test), or of a UTF-8 text file with one prompt a line; blank lines are skipped.

    Raises FileNotFoundError or ValueError when there is nothing to read.
    """
    if source.startswith("shapes:"):
        from flowbp.shapes import prompts

        return [Prompt(*prompt) for prompt in prompts(source.removeprefix("shapes:"))]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt file {source!r} does not exist; data.prompts and evaluation.prompts name text files with one prompt a line"
        )
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {source!r} is not UTF-8 text ({error}): save it as UTF-8, one prompt a line") from error
    prompts = [Prompt(text) for text in texts if text]
    if not prompts:
        raise ValueError(f"prompt file {source!r} holds no prompt; write one a line")
    return prompts


class PromptStream:
    """An endless shuffled stream; every prompt once an epoch, each epoch in its own order."""

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def batch(self, index: int, size: int) -> list[Prompt]:
        """The `index`-th batch of `size` prompts; any index can be asked for directly."""
        return [self._at(position) for position in range(index * size, (index + 1) * size)]

    def texts(self, count: int) -> list[str]:
        """The different texts among the first `count` prompts of the stream, in order of appearance."""
        return list(dict.fromkeys(self._at(position).text for position in range(count)))

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return self.prompts[self._order[offset]]


def sample_seeds(*key: int, count: int) -> list[int]:
    """One independent seed a sample, from any key of non-negative integers such as (seed, step)."""
    return [int(word) for word in np.random.SeedSequence(key).generate_state(count, np.uint64) >> np.uint64(1)]
