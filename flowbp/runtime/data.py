"""Prompts: how they are read, and the order in which they are served.

The order depends on the seed and the step alone, so that a resumed run sees the same prompts.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowbp import shapes
from flowbp.given import cut, once, read_text, short
from flowbp.shapes import Prompt

PROMPT, CATEGORY = ("prompt", "prompts", "text"), ("category", "tag")  # what keys and columns are called, in any case
SUFFIXES = ("", ".txt", ".json", ".jsonl", ".csv", ".tsv")
QUOTED = re.compile('"(?:[^"]|"")*"')
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # halves of UTF-16 among them: no file and no tokenizer takes these


def load_prompts(source: str) -> list[Prompt]:
    """The prompts of "shapes:<split>" (train, dev, test), or of a UTF-8 file, by the end of its name in any case:

    .txt, none    one prompt a line
    .jsonl        one object a line: GenEval's evaluation_metadata.jsonl
    .json         a list of prompts or of objects, or {category: list}: HPDv2's test.json and benchmark files, ReFL data
    .csv, .tsv    a table whose first row names its columns: DrawBench, DPG-Bench; PartiPrompts.tsv

    An object or a row has its prompt under "prompt", "prompts" or "text", and may have a "category" or "tag", in any
    case of letters. A .csv quotes what has commas or line ends; a .tsv needs no quotes. Rows that follow each other and
    agree in "item_id" and prompt are one prompt (DPG-Bench has one row a question).

    A folder is read as its .json files, each a category named after its file (HPDv2's benchmark: anime.json, ...), or
    as its .txt files (DPG-Bench). Blank prompts are skipped. Raises FileNotFoundError or ValueError when there is
    nothing to read or it is not of that form.
    """
    if source.startswith("shapes:"):
        return shapes.prompts(source.removeprefix("shapes:"))
    path = Path(source)
    if not path.exists():
        keys = "data.prompts and evaluation.prompts name files or folders of prompts"
        raise FileNotFoundError(f"prompt file {short(source)} does not exist; {keys}")
    found = _read_folder(path) if path.is_dir() else _read_prompts(path)
    if not (prompts := [Prompt(text.strip(), category) for text, category in found if text.strip()]):
        raise ValueError(f"prompt file {source!r} holds no prompt; write one a line")
    if strange := [tuple(prompt) for prompt in prompts if NO_TEXT.search("".join(prompt))]:
        raise ValueError(f"prompt file {source!r} holds {short(strange[0])}, which is no text: save it as UTF-8")
    return prompts


def _read_folder(folder: Path) -> list[Prompt]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".json", ".txt"))
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1:
        held = "both .json and .txt files" if kinds else "no .json file and no .txt file"
        rule = "a folder is read as one .json file a style, or as .txt files alone"
        raise ValueError(f"prompt folder {str(folder)!r} holds {held}; {rule}")
    return [prompt for file in files for prompt in _read_prompts(file, file.stem)]


def _read_prompts(path: Path, style: str = "") -> list[Prompt]:
    """style: the category of those prompts of a .json file that have none."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = f"the name of a prompt file ends in {', '.join(SUFFIXES[1:])}"
        raise ValueError(f"prompt file {str(path)!r} is of an unknown kind; {known}: one prompt a line is .txt")
    text = read_text(path)
    lines = text.split("\n")  # prompts may hold the other separators of Unicode
    if suffix == ".jsonl":
        found = []
        for number, line in enumerate(lines, 1):
            with _naming(f"{path}, line {number}"):
                found += [_prompt(json.loads(line, object_pairs_hook=once))] if line.strip() else []
        return found
    if suffix == ".json":
        with _naming(str(path)):
            data = json.loads(text, object_pairs_hook=once)
            lists = isinstance(data, dict) and all(isinstance(value, list) for value in data.values())
            if lists and _value(data, CATEGORY) is None:  # with a list of categories these are columns
                return [_prompt(entry, category or style) for category in data for entry in data[category]]
            return [_prompt(entry, style) for entry in (data if isinstance(data, list) else [data])]
    if suffix in (".csv", ".tsv"):
        return _table(text, path, tabs=suffix == ".tsv")
    return [Prompt(line) for line in lines]


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Every error of parsing becomes a ValueError that names the place and says what to write."""
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        way_out = 'write {"prompt": ..., "category": ...}, or columns of these names'
        raise ValueError(f"prompt file {where} cannot be read: {cut(error, 200)}; {way_out}") from error


def _value(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of `names`, in any case, that is a key; None without one."""
    known = {key.lower(): value for key, value in values.items()}
    return next((known[name] for name in names if name in known), None)


def _prompt(entry: Any, style: str = "") -> Prompt:
    """The prompt of a text, an object or a row. style: its category without one. Raises TypeError without a prompt."""
    values = {"prompt": entry} if isinstance(entry, str) else entry
    text = _value(values, PROMPT) if isinstance(values, dict) else None
    if not isinstance(text, str):
        keys = f": its keys are {short(list(values))}" if isinstance(values, dict) else ""
        raise TypeError(f"{short(entry)} is neither a prompt nor an object with the text 'prompt'{keys}")
    return Prompt(text, str(_value(values, CATEGORY) or style))


def _table(text: str, path: Path, tabs: bool) -> list[Prompt]:
    """The prompts of a .csv, or of a .tsv, where a quote is a letter (PartiPrompts) unless a field is quoted whole."""
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if tabs else (",", csv.QUOTE_MINIMAL)
    reader, rows, line = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True), [], 1
    try:
        for row in reader:
            if any(map(str.strip, row)):
                rows.append((line, [_unquoted(cell) for cell in row] if tabs else row))
            line = reader.line_num + 1
    except csv.Error as error:
        rule = "quotes stand around a whole field, and a quote within it is written twice"
        raise ValueError(f"prompt file {path}, line {line} cannot be read: {cut(error, 200)}; {rule}") from error
    names = [name.strip() for name in rows[0][1]] if rows else []
    if rows and _value(dict.fromkeys(names, ""), PROMPT) is None:
        raise ValueError(f"prompt file {path} cannot be read: a column must be called prompt, not {short(names)}")
    found, last = [], None
    for line, row in rows[1:]:
        with _naming(f"{path}, line {line}"):
            if any(map(str.strip, row[len(names) :])):
                raise ValueError(f"{len(row)} fields in {len(names)} columns: put quotes around a prompt with commas")
            values = once([(name, cell) for name, cell in zip(names, row, strict=False) if name])
            prompt, item = _prompt(values), values.get("item_id")
            if item is None or (item, prompt) != last:
                found.append(prompt)
            last = item, prompt
    return found


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


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
