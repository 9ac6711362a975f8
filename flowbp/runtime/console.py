"""What the terminal shows: text as it was typed, progress, and those messages of libraries that a user can act on."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text
from tqdm.std import Bar, tqdm  # pyright: ignore[reportAttributeAccessIssue]
from tqdm.utils import disp_len

# Control characters but tab and line end, those that turn the direction of text, halves of UTF-16, and two code points
# that are no character, which XML refuses.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
WARNING = warnings.formatwarning
Progress = Callable[[int], object]  # takes the number that were done since the last call
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"


def plain(text: str) -> str:
    """`text` as terminals, pages and pictures may have it: characters that are obeyed instead of shown, such as those
    of an escape sequence, and those that cannot be encoded, are written as Python escapes.
    """
    return OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class TextConsole(Console):
    """A terminal that shows strings as they are: no markup, no emoji codes, no escape sequences. What has a style is a
    `rich.text.Text`. It is quiet on processes other than the main one, unless `quiet` says otherwise.
    """

    def __init__(self, quiet: bool | None = None, **options: Any):
        super().__init__(quiet=not is_main() if quiet is None else quiet, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        options.update(markup=False, emoji=False)
        return super().render_str(plain(text), **options)


class TextBar(tqdm):
    """Progress in one line, which holds the figures of the postfix, from the first on, that fit the terminal whole."""

    def __str__(self) -> str:
        if self.bar_format is not None:
            return plain(super().__str__())
        about: Any = self.format_dict
        gone, left = self.format_meter(**about | {"bar_format": "{elapsed},{remaining}"}).split(",")
        first, *others = about["postfix"].split(", ") if about["postfix"] else [f"{left} left"]
        line, width = plain(f"{about['prefix']} {about['n']}/{about['total']}"), (about["ncols"] or 80) - 1
        figures = [plain(figure) for figure in dict.fromkeys([first, f"{left} left", *others, f"{gone} gone"])]
        while figures and disp_len(f"{line}, {', '.join(figures)}") > width:
            figures.pop()
        told = ", ".join(figures)
        if (spare := width - disp_len(f"{line} || {told}")) >= 10:
            drawn = Bar(about["n"] / max(1, about["total"]), spare, Bar.ASCII if about["ascii"] else Bar.UTF)
            return f"{line} |{drawn}| {told}"
        return f"{line}, {told}" if told else line


class TextRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return plain(super().getMessage())


def tame_libraries() -> None:
    """Show all messages that are logged or warned of as text. Imports no library."""
    logging.setLogRecordFactory(TextRecord)
    warnings.formatwarning = lambda *about, **options: plain(WARNING(*about, **options))


def is_main() -> bool:
    """Whether this is the main one of the processes that a launcher started. It loads nothing."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(what: str, unit: str, total: int, done: int = 0) -> tqdm:
    """A bar that redraws on a terminal, and writes a line a minute to a file. Only the main process shows one."""
    about = {"desc": what, "unit": unit, "total": total, "initial": done, "disable": not is_main()}
    if sys.stderr.isatty():
        return TextBar(**about, mininterval=0.2, dynamic_ncols=True)
    return TextBar(**about, mininterval=60.0, maxinterval=60.0, bar_format=LINE, file=Lines(sys.stderr))


class Lines:
    """A stream on which each new state of a bar is a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text not in ("", self.last):
            self.stream.write(f"{text}\n")
            self.last = text

    def flush(self) -> None:
        self.stream.flush()
