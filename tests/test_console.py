"""What goes to a file is lines of text, and of the libraries' messages only those that ask for something."""

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table

import flowbp
from flowbp.backbones import HARMLESS
from flowbp.cli import commands, terminal
from flowbp.cli.tables import comparison_table, listed, table
from flowbp.runtime.console import TextBar, TextConsole, plain, progress_bar, tame_libraries

TYPED = "a [/b] [red]cat[/red] :cat: $$ 猫 👨\u200d👩"
OBEYED = "\x1b[2J\x1b]0;owned\x07\r\x9b1m\u202e\udc80"
WRITTEN = r"\x1b[2J\x1b]0;owned\x07\r\x9b1m\u202e\udc80"


def test_progress_in_a_file_is_lines_without_control_characters(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("train", "step", 3, done=1) as bar:
        bar.set_postfix_str("reward 0.5", refresh=False)
        bar.update(2)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("train: 1/3 steps") and last.startswith("train: 3/3 steps") and last.endswith("reward 0.5")
    assert not {"\r", "\x1b"} & set(stream.getvalue())


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_bar_is_one_line_of_whole_figures_of_which_the_first_stay(width):
    figures = ["reward 0.4934", "00:00 left", "2 skipped", "1.32 s/step", "peak 740 MB", "00:00 gone"]
    bar = TextBar(desc="train", total=300, initial=120, ncols=width, file=io.StringIO())
    bar.set_postfix_str(", ".join(figures[:1] + figures[2:5]), refresh=False)
    line = re.sub(r"\|.*\|", ",", str(bar)).replace(" ,", ",").replace("? left", "00:00 left")
    begun, *told = line.split(", ")
    assert len(str(bar)) < width and begun == "train 120/300" and told == figures[: len(told)]
    assert len(told) >= {20: 0, 40: 1, 60: 3, 80: 5, 120: 6}[width]


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
    tame_libraries()
    for name, harmless in HARMLESS.items():
        logger = logging.getLogger(name)
        caplog.set_level(logging.WARNING, name)
        logger.addHandler(handler)
        logger.warning("`CLIPTokenizer` %s, and so on", harmless)
        logger.warning("your prompt was truncated")
        logger.removeHandler(handler)
    assert seen == ["your prompt was truncated"] * len(HARMLESS)


def shown(*parts, **options):
    console = TextConsole(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    console.print(*parts, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_a_line_is_shown_as_it_was_typed(soft_wrap):
    assert shown(TYPED + OBEYED, soft_wrap=soft_wrap, markup=True) == f"{TYPED}{WRITTEN}\n"
    assert plain("one\n\ttwo") == "one\n\ttwo"


def test_titles_headings_captions_and_cells_are_shown_as_they_were_typed():
    table = Table(TYPED + OBEYED, title=TYPED + OBEYED, caption=TYPED + OBEYED)
    table.add_row(TYPED + OBEYED)
    output = shown(table)
    assert output.count(TYPED + WRITTEN) == 4 and not set(OBEYED) & set(output) - set(WRITTEN)


def test_categories_models_and_runs_are_shown_as_they_were_typed():
    row = {
        "metric": "[m]",
        "category": "all",
        "count": 4,
        "missing": 0,
        "mean": 0.5,
        "low": 0.4,
        "high": 0.6,
        "run": "[/b]",
    }
    change = row | {"before": 0.4, "after": 0.5, "change": 0.1, "p_value": 0.04}
    changes = comparison_table([change, change | {"category": "[/b]"}], "[/runs]/[bold]", "[/x]", "[y]")
    means = shown(table("means", "[/t]", rows=[row], who="run"))
    assert "4 │ 0.500 │ [0.400, 0.600]" in means
    output = shown(changes) + means + shown(listed([("[/v]", "[w]")]))
    assert all(text in output for text in ("[m]", "[/b]", "[/runs]/[bold]", "[/x]", "[y]", "[/t]", "[/v]: [w]"))


def test_an_error_and_a_bar_show_names_as_they_were_typed(monkeypatch, capsys):
    def fail(**options):
        raise ValueError(f"no folder {TYPED}{OBEYED}")

    monkeypatch.setattr(terminal, "app", fail)
    with pytest.raises(SystemExit):
        commands.main()
    assert capsys.readouterr().err == f"error: no folder {TYPED}{WRITTEN}\n"
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("[/b]\x1b[2J", "image", 1) as bar:
        bar.set_postfix_str("\x1b[3J")
        bar.update()
    assert r"[/b]\x1b[2J" in stream.getvalue() and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("arguments", [["train", f"--no{OBEYED}"], [f"no{OBEYED}"], ["plan", "refl", f"--{OBEYED}"]])
def test_what_typer_refuses_is_shown_as_it_was_typed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flowbp", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.main()
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.startswith("error: ") and not set(OBEYED) & set(shown) - set(WRITTEN)
    assert "--help)" in shown and r"\x1b" in shown


def test_what_libraries_log_and_warn_of_is_shown_as_text(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    stream = io.StringIO()
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler(stream))
    tame_libraries()
    logger = logging.Logger("stranger")
    logger.addHandler(logging.lastResort)
    logger.warning("%s is left out", OBEYED)
    assert stream.getvalue() == f"{WRITTEN} is left out\n"
    assert WRITTEN in warnings.formatwarning(OBEYED, UserWarning, "a.py", 1, "")


def test_nothing_prints_past_the_owner_of_plain_text():
    """rich's own console and its markup are nowhere else in the package."""
    past = re.compile(r"rich\.(console|markup) import|rich import print|\[/\]")
    files = Path(flowbp.__file__).parent.rglob("*.py")
    assert [path.name for path in files if past.search(path.read_text(encoding="utf-8"))] == ["console.py"]


def test_a_fall_that_is_confirmed_is_as_bold_as_a_rise():
    row = {"metric": "clip", "category": "all", "count": 9, "missing": 0, "before": 0.4, "after": 0.5}
    changes = [(0.1, 0.3, 0.01), (-0.3, -0.1, 0.01), (-0.1, 0.3, 0.01), (0.1, 0.3, 0.06)]
    rows = [row | {"change": (low + high) / 2, "low": low, "high": high, "p_value": p} for low, high, p in changes]
    table = comparison_table(rows, "title")
    assert [shown_row.style for shown_row in table.rows] == ["bold", "bold", None, None]
