"""What goes to a file is lines of text, and of the libraries' messages only those that ask for something."""

import io
import logging
import sys

from flowbp.runtime.console import HARMLESS, hush_libraries, progress_bar


def test_progress_in_a_file_is_lines_without_control_characters(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("train", "step", 3, done=1) as bar:
        bar.set_postfix_str("reward 0.5", refresh=False)
        bar.update(2)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("train: 1/3 steps") and last.startswith("train: 3/3 steps") and last.endswith("reward 0.5")
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_one_process_of_several_shows_progress(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", "1")
    with progress_bar("train", "step", 3) as bar:
        bar.update(3)
    assert stream.getvalue() == ""


def test_only_harmless_messages_are_hushed(caplog):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    hush_libraries()
    for name, harmless in HARMLESS.items():
        logger = logging.getLogger(name)
        caplog.set_level(logging.WARNING, name)
        logger.addHandler(handler)
        logger.warning("`CLIPTokenizer` %s, and so on", harmless)
        logger.warning("your prompt was truncated")
        logger.removeHandler(handler)
    assert seen == ["your prompt was truncated"] * len(HARMLESS)
