"""Prompts: how they are read, and the order in which they are served.

The order depends on the seed and the step alone, so that a resumed run sees the same prompts.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Prompt(NamedTuple):
    text: str
    category: str = ""


def load_prompts(source: str) -> list[Prompt]:
    """The prompts of "shapes:<split>" (train, dev, test), or of a UTF-8 file, by the end of its name:

    .jsonl  one object a line with "prompt" and optionally "category" or "tag": also GenEval's evaluation_metadata.jsonl
    .json   a list of prompts or of such objects, or {category: list}: also HPDv2's test.json and its benchmark files
    .csv    a column "prompt" and optionally "category" or "tag"
    other   one prompt a line

    A folder is read as the .json files in it, each a category named after its file: HPDv2's benchmark (anime.json,
    photo.json, ...). Blank prompts are skipped. Raises FileNotFoundError or ValueError when there is nothing to read or
    it is not of that form.
    """
    if source.startswith("shapes:"):
        from flowbp.shapes import prompts

        return [Prompt(*prompt) for prompt in prompts(source.removeprefix("shapes:"))]
    path = Path(source)
    if not path.exists():
        keys = "data.prompts and evaluation.prompts name text files with one prompt a line"
        raise FileNotFoundError(f"prompt file {source!r} does not exist; {keys}")
    if path.is_dir():
        styles = {file.stem: _read_prompts(file) for file in sorted(path.glob("*.json"))}
        if not styles:
            raise ValueError(f"prompt folder {source!r} holds no .json file; a folder is read as one such file a style")
        found = [Prompt(text, category or style) for style, prompts in styles.items() for text, category in prompts]
    else:
        found = _read_prompts(path)
    prompts = [Prompt(text.strip(), category) for text, category in found if text.strip()]
    if not prompts:
        raise ValueError(f"prompt file {source!r} holds no prompt; write one a line")
    return prompts


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Only line ends divide them: prompts may hold the other separators of Unicode."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {str(path)!r} is not UTF-8 text ({error}): save it as UTF-8") from error


def _read_prompts(path: Path) -> list[Prompt]:
    lines, name = read_lines(path), str(path)
    if path.suffix == ".jsonl":
        parsed = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
        return [prompt for prompts in parsed for prompt in prompts]
    if path.suffix == ".json":
        return _parse("\n".join(lines), name)
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO("\n".join(lines)))
        if table.fieldnames and "prompt" not in table.fieldnames:
            columns = f"a column must be called prompt, not {table.fieldnames}"
            raise ValueError(f"prompt file {name!r} cannot be read: {columns}")
        return _entries([row for row in table if row["prompt"]])
    return [Prompt(line) for line in lines]


def _parse(text: str, where: str) -> list[Prompt]:
    try:
        return _entries(json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        way_out = 'write {"prompt": ..., "category": ...}'
        raise ValueError(f"prompt file {where} cannot be read: {error}; {way_out}") from error


def _entries(data: Any) -> list[Prompt]:
    """Prompts of parsed JSON. Raises TypeError for what is neither a prompt nor an object that holds one."""
    if isinstance(data, dict) and "prompt" not in data:
        return [Prompt(text, category or key) for key, items in data.items() for text, category in _entries(items)]
    found = []
    for entry in data if isinstance(data, list) else [data]:
        values = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise TypeError(f"{str(entry)[:60]!r} is neither a prompt nor an object with the text 'prompt'")
        found.append(Prompt(values["prompt"], str(values.get("category") or values.get("tag") or "")))
    return found


class PromptStream:
    """An endless shuffled stream. An epoch serves every prompt once, in an order of its own."""

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def batch(self, index: int, size: int) -> list[Prompt]:
        """The `index`-th batch of `size` prompts, found without the batches before it."""
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
    """`count` independent seeds, one a sample, from a key of non-negative integers such as (seed, step)."""
    return [int(word) for word in np.random.SeedSequence(key).generate_state(count, np.uint64) >> np.uint64(1)]
