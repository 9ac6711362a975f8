"""What pages and the terminal show: the templates of flowbp/templates, and numbers as people read them.

Filters of templates are functions under their own names: those of this module, and what others add that have more to
say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from flowbp.given import IMAGE_STATISTICS, read_data
from flowbp.runtime.console import plain

METRICS: dict[str, dict[str, Any]] = read_data(__file__, "metrics.yaml")
NOT_BETTER = [name for name in IMAGE_STATISTICS if name != "diversity"]  # a higher one is neither better nor worse
TEMPLATES = Environment(
    loader=PackageLoader("flowbp"), autoescape=select_autoescape(), trim_blocks=True, undefined=StrictUndefined
)
TEMPLATES.globals |= {"not_better": NOT_BETTER, "image_statistics": IMAGE_STATISTICS, "about": METRICS}


def render(template: str, **values: Any) -> str:
    """A page of flowbp/templates, as HTML."""
    return plain(TEMPLATES.get_template(template).render(**values))


def words(macro: str, **values: Any) -> list[str]:
    """The lines that a macro of words.jinja says."""
    said = getattr(TEMPLATES.get_template("words.jinja").module, macro)(**values)
    return [line for line in said.split("\n") if line]


# -- numbers: decimals, intervals, p values ----------------------------------------------------------------------------


def number(value: float | None, scale: float = 1.0, sign: str = "") -> str:
    """Three decimals; two figures of `scale` where that is below .01, three figures from 100 on. A dash for nan."""
    if _undefined(value):
        return "–"
    magnitude = math.floor(math.log10(abs(scale))) if scale else 0  # 10^magnitude <= |scale|
    decimals = 1 - magnitude if magnitude < -2 else 3 if magnitude < 2 else max(0, 2 - magnitude)
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0: no negative zero


def between(ends: Sequence[float | None], scale: float = 1.0) -> str:
    """An interval as [low, high]; a dash where there are too few prompts; words where all prompts are equal."""
    if _undefined(ends[0]):
        return "–"
    return "all equal" if ends[0] == ends[1] else f"[{number(ends[0], scale)}, {number(ends[1], scale)}]"


def scale_of(row: Mapping[str, Any]) -> float:
    """The size of the means of a row."""
    return _largest(row, "mean", "before", "after")


def scale_of_change(row: Mapping[str, Any]) -> float:
    """The size of a row's change and its interval, which may be far smaller than its means."""
    return _largest(row, "change", "low", "high")


def _largest(row: Mapping[str, Any], *keys: str) -> float:
    return max((abs(row[key]) for key in keys if not _undefined(row.get(key))), default=1.0)


def p_text(p: float | None) -> str:
    return "–" if _undefined(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def direction(row: Mapping[str, Any]) -> int:
    """1 or -1 where the interval of a change excludes zero and p < .05, else 0.

    Both are asked for because the interval alone is too narrow with few prompts.
    """
    if _undefined(row["low"]) or row["p_value"] >= 0.05:
        return 0
    return int(row["low"] > 0) - int(row["high"] < 0)


def duration(seconds: float) -> str:
    """A time in its natural unit: 45 s, 12.5 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a table for people: image statistics over all images only."""
    return [row for row in rows if row["category"] == "all" or row["metric"] not in IMAGE_STATISTICS]


def by_metric(rows: Sequence[Mapping[str, Any]], who: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{metric: {row[who]: row}} of the rows over all images. who: "run" or "model"."""
    table: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["category"] == "all":
            table.setdefault(row["metric"], {})[row[who]] = row
    return table


def grouped(values: Sequence[Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(value, the runs that have it) for each value, which stays readable with many runs. A dash stands for a key that
    a run lacks.
    """
    runs: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        runs.setdefault("–" if value is None else str(value), []).append(name)
    return [(value, ", ".join(own)) for value, own in runs.items()]


def _undefined(value: float | None) -> bool:
    """nan, or the null that stands for it in JSON."""
    return value is None or math.isnan(value)


# Of templates, under their own names.
FILTERS = (number, between, scale_of, scale_of_change, p_text, direction, duration, gigabytes)
FILTERS += (shown, by_metric, grouped)
TEMPLATES.filters |= {function.__name__: function for function in FILTERS}
TEMPLATES.globals["words"] = words
