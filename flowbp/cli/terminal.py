"""What commands share: the console, and the arguments that name a run."""

from functools import partial
from typing import Annotated

from typer import Argument, Option

from flowbp.runtime.console import TextConsole

console = TextConsole()
say = partial(console.print, highlight=False)  # wrapped at words
say_unwrapped = partial(say, soft_wrap=True)  # what is copied from the terminal: paths and commands

Config = Annotated[str, Argument(help="a YAML file, the folder of a run, or a preset such as demo")]
Overrides = Annotated[list[str] | None, Argument(help="key.path=value overrides, such as method.alpha=0.3")]
Processes = Annotated[int, Option(min=1, help="of this machine; a step takes data.batch_size samples from each")]
