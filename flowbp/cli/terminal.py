"""The frame of the command line: its console, how an error ends it, and the arguments that commands share."""

import os
import sys
from functools import partial
from typing import Annotated

import typer
from rich.text import Text
from typer import Argument, Option

from flowbp import __version__
from flowbp.given import cut
from flowbp.runtime.console import TextConsole, tame_libraries

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = TextConsole()  # of the main process; that of others is quiet
say = partial(console.print, highlight=False)  # wrapped at words
say_unwrapped = partial(say, soft_wrap=True)  # what is copied from the terminal: paths and commands

Config = Annotated[str, Argument(help="a YAML file, the folder of a run, or a preset such as demo")]
Overrides = Annotated[list[str] | None, Argument(help="key.path=value overrides, such as method.alpha=0.3")]
Processes = Annotated[int, Option(min=1, help="of this machine; a step takes data.batch_size samples from each")]


def main() -> None:
    """Run the command line; errors of the user's making end with one clear message instead of a traceback."""
    try:
        if code := app(standalone_mode=False):
            sys.exit(code)
    except Exception as error:
        message = str(error)
        if hasattr(error, "format_message"):  # typer's own errors, whose class differs between its versions
            command = getattr(getattr(error, "ctx", None), "command_path", "flowbp")
            message = error.format_message() and f"{error.format_message()} ({command} --help)"
        elif isinstance(error, OSError) and error.strerror and error.filename:  # else: "[Errno 2] No such file ..."
            message = f"{error.filename}: {error.strerror}"
        elif not isinstance(error, ValueError | OSError | RecursionError):
            raise
        if message:  # none after the help that a command without arguments has printed
            to_stderr = TextConsole(stderr=True, quiet=False)
            to_stderr.print(Text("error:", "bold red"), cut(message, 4000), highlight=False, soft_wrap=True)
        sys.exit(2)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"flowbp {__version__}")
        raise typer.Exit


@app.callback()
def quiet_libraries(
    version: Annotated[bool, Option("--version", callback=show_version, is_eager=True, help="print it")] = False,
) -> None:
    """Align text-to-image flow models by reward backpropagation."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    tame_libraries()
