"""What the command line prints, as tables of 80 columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from flowbp.evaluation.numbers import (
    between,
    direction,
    notes,
    number,
    p_text,
    scale_of,
    scale_of_change,
    shown,
    signed,
)


def estimate_table(found, title: str) -> Table:
    """Gigabytes of what is always there, of what comes and goes, and of all that each part of a run holds at its
    peak.
    """
    caption = f"{found.trained:,} parameters trained,\non a network of {found.parameters:,}"
    table = Table("memory", "GB", title=title, caption=caption, min_width=44)
    table.columns[1].justify = "right"
    sections = {"always there": found.resident, "comes and goes": found.working, "peak in": found.peaks}
    for heading, terms in sections.items():
        table.add_row(heading, "", style="dim")
        for name, size in terms.items():
            if size:
                table.add_row(
                    f"  {name}",
                    gigabytes(size),
                    style="bold" if heading == "peak in" and name == found.peak_phase else None,
                )
        table.add_section()
    return table


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


def plan_table(drawn, sigmas, title: str) -> Table:
    """The plan's nodes as a table; active nodes in bold."""
    numbers = (Column(name, justify="right") for name in ("node", "sigma", "value weight", "gradient weight"))
    table = Table(*numbers, "role", title=title)
    for node, weight, grad_weight in zip(drawn.nodes, drawn.weights, drawn.grad_weights, strict=True):
        roles = ["active"] if grad_weight else ["cached"]
        if drawn.bridge is not None and node == drawn.bridge.node:
            roles.append("bridge")
        gradient = f"{grad_weight:+.4f}" if grad_weight else ""
        table.add_row(
            str(node),
            f"{sigmas[node]:.4f}",
            f"{weight:+.4f}",
            gradient,
            ", ".join(roles),
            style="bold" if grad_weight else "dim",
        )
    return table


def comparison_table(rows: list[dict], title: str, before: str = "before", after: str = "after") -> Table:
    """Paired changes; image statistics over all images only. Bold marks a change that its interval and its test
    confirm.
    """
    table = metric_table(title, "n", before, after, "change, 95 %", "p")
    table.caption = "\n".join(notes(rows)) or None
    for row in shown(rows):
        scale, finer = scale_of(row), scale_of_change(row)
        change = f"{signed(row['change'], finer)} {between((row['low'], row['high']), finer)}"
        cells = (
            str(row["count"]),
            number(row["before"], scale),
            number(row["after"], scale),
            change,
            p_text(row["p_value"]),
        )
        table.add_row(metric_label(row), *cells, style="bold" if direction(row) else None)
    return table


def means_table(rows: list[dict], column: str, title: str) -> Table:
    """The mean of each metric over all images and its interval, for each run or model."""
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    table.add_column(column)
    for name in ("n", "mean", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    by_metric: dict[str, list[dict]] = {}
    for row in rows:
        if row["category"] == "all":
            by_metric.setdefault(row["metric"], []).append(row)
    for metric, found in by_metric.items():
        for i, row in enumerate(found):
            interval = between((row["low"], row["high"]), scale_of(row))
            cells = (escape(row[column]), str(row["count"]), number(row["mean"], scale_of(row)), interval)
            table.add_row("" if i else metric, *cells, end_section=i + 1 == len(found))
    return table


def metric_table(title: str, *columns: str) -> Table:
    """An empty table of a column of metrics and `columns` of numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("metric", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def metric_label(row: dict) -> str:
    """The metric's name, or below it the indented name of a category."""
    return row["metric"] if row["category"] == "all" else f" {row['category']}"


def evaluation_tables(results: dict, title: str) -> Iterator[Table]:
    """One table of paired changes for each tuned model; without any, the base model's means."""
    for name in [model["name"] for model in results["models"][1:]]:
        rows = [row for row in results["changes"] if row["model"] == name]
        yield comparison_table(rows, f"{name} against base: {title}", "base", "tuned")
    if not results["changes"]:
        table = metric_table(f"base: {title}", "n", "mean", "95 %")
        table.caption = "\n".join(notes(results["means"])) or None
        for row in results["means"]:
            scale = scale_of(row)
            table.add_row(
                metric_label(row),
                str(row["count"]),
                number(row["mean"], scale),
                between((row["low"], row["high"]), scale),
            )
        yield table


def listed(parts: list[tuple[str, str]]) -> str:
    """value: the runs that have it, one value a line."""
    return escape("\n".join(f"{value}: {names}" for value, names in parts))


def non_defaults(built) -> str:
    """The fields of a dataclass that differ from its defaults, on one line; a nested one by its class and its own."""
    shown = []
    for field in dataclasses.fields(built):
        value, default = getattr(built, field.name), field.default
        if value != default:
            nested = f"{type(value).__name__}({non_defaults(value)})" if dataclasses.is_dataclass(value) else value
            shown.append(f"{field.name} {nested}")
    return ", ".join(shown)
