"""Which forwards of diffusers and peft were re-stated here, by the fingerprint of their source.

A fingerprint is a hash of the tokens, without comments and white space. Where the installed source has another one, its
forward may compute something else than the function that would take its place.
"""

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

MARKS = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}
IGNORED = (tokenize.COMMENT, tokenize.NL)


def restates(*sources: tuple[Callable, str]) -> Callable:
    """A decorator: the function takes the place of these functions, whose fingerprints were read with them."""

    def mark(function: Callable) -> Callable:
        function.restates = sources
        return function

    return mark


def changed(function: Callable) -> list[str]:
    """The sources of a re-stated function whose fingerprints are not those with which they were read."""
    return [
        f"{source.__qualname__} of {source.__module__.partition('.')[0]} {version(source.__module__.partition('.')[0])}"
        for source, known in function.restates
        if fingerprint(source) != known
    ]


@cache
def fingerprint(function: Callable) -> str:
    """12 hexadecimal digits; "unreadable" where the source is not installed."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:
        return "unreadable"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = "".join(MARKS.get(token.type, token.string) for token in tokens if token.type not in IGNORED)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
