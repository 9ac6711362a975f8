"""What the command line prints, as tables of 80 columns."""

import dataclasses
from collections.abc import Iterator

from rich import box
from rich.table import Column, Table

from flowbp.evaluation import numbers
from flowbp.evaluation.numbers import between, number, scale_of, scale_of_change


def estimate_table(estimate, title: str) -> Table:
    """Gigabytes of what is always in memory, of what comes and goes, and of all that each part of a run takes at its
    peak.
    """
    caption = f"{estimate.trained:,} parameters trained,\non a network of {estimate.network.parameters:,}"
    table = Table("memory", Column("GB", justify="right"), title=title, caption=caption, min_width=44)
    sections = {"always there": estimate.resident, "comes and goes": estimate.working, "peak in": estimate.peaks}
    for heading, terms in sections.items():
        table.add_row(heading, "", style="dim")
        for name, size in terms.items():
            highest = heading == "peak in" and name == estimate.peak_phase
            if size:
                table.add_row(f"  {name}", gigabytes(size), style="bold" if highest else None)
        table.add_section()
    return table


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


def plan_table(drawn, sigmas, title: str) -> Table:
    """The plan's nodes as a table; active nodes in bold."""
    columns = (Column(name, justify="right") for name in ("node", "sigma", "value weight", "gradient weight"))
    table = Table(*columns, "role", title=title)
    for node, weight, grad_weight in zip(drawn.nodes, drawn.weights, drawn.grad_weights, strict=True):
        role = "active" if grad_weight else "cached"
        if drawn.bridge is not None and node == drawn.bridge.node:
            role += ", bridge"
        gradient, style = (f"{grad_weight:+.4f}", "bold") if grad_weight else ("", "dim")
        table.add_row(str(node), f"{sigmas[node]:.4f}", f"{weight:+.4f}", gradient, role, style=style)
    return table


def comparison_table(rows: list[dict], title: str, before: str = "before", after: str = "after") -> Table:
    """Paired changes; image statistics over all images only. Bold marks a change that its interval and its test
    confirm.
    """
    table = metric_table(rows, title, "n", before, after, "change, 95 %", "p")
    for row in numbers.shown(rows):
        scale, finer = scale_of(row), scale_of_change(row)
        means = number(row["before"], scale), number(row["after"], scale)
        change = f"{numbers.signed(row['change'], finer)} {between((row['low'], row['high']), finer)}"
        style = "bold" if numbers.direction(row) else None
        table.add_row(label(row), str(row["count"]), *means, change, numbers.p_text(row["p_value"]), style=style)
    return table


def means_table(rows: list[dict], column: str, title: str) -> Table:
    """The mean of each metric over all images and its interval, for each run or model, which `column` names."""
    figures = (Column(name, justify="right", no_wrap=True) for name in ("n", "mean", "95 %"))
    table = Table(Column("metric", no_wrap=True), column, *figures, title=title)
    for metric, own in numbers.by_metric(rows, column).items():
        for i, (name, row) in enumerate(own.items(), 1):
            table.add_row("" if i > 1 else metric, name, *mean_cells(row), end_section=i == len(own))
    return table


def metric_table(rows: list[dict], title: str, *columns: str) -> Table:
    """An empty table of a column of metrics and `columns` of numbers, with the notes on `rows` below it."""
    figures = (Column(column, justify="right", no_wrap=True) for column in columns)
    caption = "\n".join(numbers.notes(rows)) or None
    style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    return Table(Column("metric", no_wrap=True), *figures, title=title, caption=caption, **style)


def label(row: dict) -> str:
    """The metric's name, or the indented name of a category in the rows below it."""
    return row["metric"] if row["category"] == "all" else f" {row['category']}"


def mean_cells(row: dict) -> tuple[str, str, str]:
    """The number of images, their mean, and its interval."""
    scale = scale_of(row)
    return str(row["count"]), number(row["mean"], scale), between((row["low"], row["high"]), scale)


def evaluation_tables(results: dict, title: str) -> Iterator[Table]:
    """One table of paired changes for each tuned model; without any, the base model's means."""
    for name in [model["name"] for model in results["models"][1:]]:
        rows = [row for row in results["changes"] if row["model"] == name]
        yield comparison_table(rows, f"{name} against base: {title}", "base", "tuned")
    if not results["changes"]:
        table = metric_table(results["means"], f"base: {title}", "n", "mean", "95 %")
        for row in results["means"]:
            table.add_row(label(row), *mean_cells(row))
        yield table


def listed(parts: list[tuple[str, str]]) -> str:
    """value: the runs that have it, one value a line."""
    return "\n".join(f"{value}: {names}" for value, names in parts)


def non_defaults(built) -> str:
    """The fields of a dataclass that differ from its defaults, on one line; a nested one as Class(its own fields)."""
    given = []
    for field in dataclasses.fields(built):
        value = getattr(built, field.name)
        if value != field.default:
            nested = f"{type(value).__name__}({non_defaults(value)})" if dataclasses.is_dataclass(value) else value
            given.append(f"{field.name} {nested}")
    return ", ".join(given)
