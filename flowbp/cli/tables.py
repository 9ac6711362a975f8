"""What the command line prints, as tables of 80 columns: those of templates/terminal.html, and what doctor found."""

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from flowbp.config import describe, flatten
from flowbp.evaluation.templates import TEMPLATES
from flowbp.runtime.console import plain
from flowbp.runtime.reproducible import math_library

# What the classes of terminal.html mean to rich.
STYLES = {
    "open": {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True},
    "ruled": {"show_lines": True},
    "estimate": {"min_width": 44},
    "n": {"justify": "right"},
    "whole": {"no_wrap": True},
    "roomy": {"min_width": 10},
    "fold": {"overflow": "fold"},
}


class Fitting(Table):
    """A table of up to 80 columns. In a narrower terminal that would cut it, each row is some lines: its first cell,
    then the others under their headers; or both cells on one line.
    """

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for column in self.columns:
            if column.no_wrap:  # else rich takes the longest word for what it needs
                column.min_width = max(Measurement.get(console, options, cell).maximum for cell in column.cells)
        needed = Measurement.get(console, options.update(max_width=80), self).minimum
        if options.max_width >= min(needed, 80):
            yield from super().__rich_console__(console, options)
            return
        yield Text.assemble((str(self.title), "bold"), "\n")
        if len(self.columns) == 2:
            yield Text(": ".join(str(column.header) for column in self.columns), "dim")
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            if len(others) == 1:
                yield Text.assemble(first, *((": ", others[0]) if others[0] else ()))
            else:
                told = [(column.header, each) for column, each in zip(self.columns[1:], others, strict=True) if each]
                yield Text.assemble(first, *(part for header, each in told for part in (f"\n  {header}: ", each)))
        yield Text(f"\n{self.caption or ''}".rstrip())


def table(name: str, title: str | Text, **values: Any) -> Table:
    """The table that the macro `name` of terminal.html makes of `values`."""
    html = ElementTree.fromstring(plain(getattr(TEMPLATES.get_template("terminal.html").module, name)(**values)))
    columns = [Column(head.text or "", **styled(head)) for head in html.iter("th")]
    made = Fitting(*columns, title=title, caption=html.findtext("caption") or None, **styled(html))
    for row in html.findall("tr"):
        if cells := [cell(each) for each in row.findall("td")]:
            made.add_row(*cells, style=row.get("class") or None)
        elif row.find("th") is None:
            made.add_section()
    return made


def styled(element: ElementTree.Element) -> dict[str, Any]:
    """The options of all classes of an element."""
    return {key: value for name in element.get("class", "").split() for key, value in STYLES[name].items()}


def cell(element: ElementTree.Element) -> Text:
    """The text of a cell, in which <b> is bold."""
    bold = [part for each in element for part in ((each.text or "", "bold"), each.tail or "")]
    return Text.assemble(element.text or "", *bold)


def non_defaults(built: Any) -> str:
    """The fields of a dataclass that differ from its defaults, on one line; those of a nested one as field.field."""
    given, usual = (flatten(describe(each)) for each in (built, type(built)()))
    return ", ".join(f"{key} {value}" for key, value in given.items() if usual.get(key) != value)


def comparison_table(rows: list[dict], title: str, before: str = "before", after: str = "after") -> Table:
    """Paired changes; image statistics over all images only. Bold marks a change that its interval and its test
    confirm.
    """
    return table("comparison", title, rows=rows, before=before, after=after)


def listed(parts: list[tuple[str, str]]) -> str:
    """value: the runs that have it, one value a line."""
    return "\n".join(f"{value}: {names}" for value, names in parts)


def doctor_table() -> Table:
    """Versions, the device, and which kernels run and why."""
    import torch

    from flowbp.runtime.environment import environment, versions
    from flowbp_kernels import backend  # imports torch._dynamo

    found = environment() | versions("accelerate", "peft")
    found |= {"threads": torch.get_num_threads(), "matrix products": math_library()}
    for name, runs, why in backend.report():
        found[f"kernels: {name}"] = f"{'runs' if runs else 'cannot run'}: {why}"
    return table("doctor", "flowbp doctor", found=found)


TEMPLATES.filters |= {function.__name__: function for function in (listed, non_defaults)}
