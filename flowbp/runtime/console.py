"""What the terminal shows while flowbp works: progress, and those messages of libraries that a user can act on."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

HARMLESS = {  # logger: a part of its messages that ask for nothing
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # rewards preprocess by themselves
    "diffusers.loaders.peft": "No LoRA keys associated to CLIPText",  # the text encoders are never tuned
    "diffusers.loaders.lora_base": "No LoRA keys associated to CLIPText",
    "diffusers.models.modeling_utils": "should be kept in float32: []",
}
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"


def hush_libraries() -> None:
    """Drop the HARMLESS messages; all other warnings of the libraries are shown. Imports none of them."""
    for name, part in HARMLESS.items():
        logging.getLogger(name).addFilter(lambda record, part=part: part not in record.getMessage())


def hide_loading_bars() -> None:
    """Load pipelines without diffusers' bar of seven parts."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def is_main() -> bool:
    """Whether this is the main one of the processes that a launcher started. It loads nothing."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(what: str, unit: str, total: int, done: int = 0) -> tqdm:
    """A bar that redraws on a terminal, and writes a line a minute to a file. Only the main process shows one."""
    about = {"desc": what, "unit": unit, "total": total, "initial": done, "disable": not is_main()}
    if sys.stderr.isatty():
        return tqdm(**about, mininterval=0.2, dynamic_ncols=True)
    return tqdm(**about, mininterval=60.0, maxinterval=60.0, bar_format=LINE, file=Lines(sys.stderr))


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
