"""What the command line prints, as tables of 80 columns."""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from rich import box
from rich.table import Column, Table
from rich.text import Text

from flowbp import __version__
from flowbp.config import describe, flatten
from flowbp.evaluation import numbers
from flowbp.evaluation.numbers import between, grouped, number, scale_of, scale_of_change
from flowbp.methods import METHODS
from flowbp.runtime.reproducible import math_library


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


def copies(size: int, bandwidth: float) -> str:
    """What a step with offloaded blocks copies to the device, and how long that takes at `bandwidth` bytes a second."""
    seconds = f"{size / bandwidth:.3g} s at {bandwidth / 1e9:.0f} GB/s (assumed, not measured)"
    return f"copies {gigabytes(size)} GB to the device in a step: {seconds}, less what is copied while it computes"


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


def sweep_table(rows: list[dict], title: str) -> Table:
    """The change of each metric by setting, over training runs, and the difference from the first setting."""
    figures = (Column(name, justify="right", min_width=10) for name in ("change", "one run's images", "less the first"))
    columns = "metric", Column("setting", overflow="fold"), Column("runs", justify="right"), *figures
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for metric in dict.fromkeys(row["metric"] for row in rows if row["metric"] not in numbers.NOT_BETTER):
        own = [row for row in rows if row["metric"] == metric]
        for i, row in enumerate(own):
            scale = row["change"][0]
            told = [
                "–" if part is None else f"{numbers.signed(part[0], scale)} {between(part[1:], scale)}"
                for part in (row["change"], row["difference"])
            ]
            cells = str(len(row["seeds"])), told[0], between(row["images"], scale), told[1]
            table.add_row("" if i else metric, row["setting"], *cells, end_section=i + 1 == len(own))
    return table


def metric_table(rows: list[dict], title: str, *columns: str) -> Table:
    """An empty table of a column of metrics and `columns` of numbers, with the notes on `rows` below it."""
    # Where the terminal is narrow, names and intervals go on the next line, and no number is cut.
    intervals = {"no_wrap": False, "min_width": 10}
    figures = (
        Column(column, justify="right", **(intervals if "%" in column else {"no_wrap": True, "min_width": len(column)}))
        for column in columns
    )
    caption = "\n".join(numbers.notes(rows)) or None
    style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    return Table(Column("metric"), *figures, title=title, caption=caption, **style)


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


def values_table(rows: Iterable[tuple], runs: Sequence[str], title: str | Text, *columns: str) -> Table:
    """Rows (key, what each run has for it, cells of `columns`)."""
    table = Table(Column("key", overflow="fold"), "value: runs", *columns, title=title)
    for key, values, *cells in rows:
        table.add_row(key, listed(grouped(values, runs)), *cells)
    return table


def listed(parts: list[tuple[str, str]]) -> str:
    """value: the runs that have it, one value a line."""
    return "\n".join(f"{value}: {names}" for value, names in parts)


def rewards_table(sources: Mapping) -> Table:
    """Where the published rewards are, and what their scores mean."""
    columns = (Column("reward, checkpoint, paper", no_wrap=True), "parameters, licence, scores")
    table = Table(*columns, Column("hinge", justify="right"), title="flowbp rewards", show_lines=True)
    for name, source in sources.items():
        size = f"{source.parameters / 1e6:,.0f} M" if source.parameters else "–"
        hinge = "" if source.hinge is None else f"{source.hinge:g}"
        names = Text.assemble((name, "bold"), f"\n{source.files['model'].repository}\n{source.paper}")
        table.add_row(names, f"{size}\n{source.licence}\n{source.scores}", hinge)
    return table


def presets_table(presets: Mapping) -> Table:
    """What the presets say, less the defaults."""
    settings = (Column(key, overflow="fold") for key in ("batch", "guidance", "method"))
    title = "flowbp train PRESET; defaults are left out, flowbp presets PRESET prints all"
    fast = "PRESET-fast is each of them with fewer network calls in training (docs/speed.md)"
    table = Table(Column("preset", no_wrap=True), *settings, title=title, caption=fast)
    for name, run in presets.items():
        cells = (name, str(run.data.batch_size), non_defaults(run.guidance), non_defaults(run.method))
        table.add_row(*cells, end_section=name.endswith("/flowbp-lagrange"))
    return table


def doctor_table() -> Table:
    """Versions, the device, and which kernels run and why."""
    import torch

    from flowbp_kernels import backend  # imports torch._dynamo

    table = Table("what", "found", title="flowbp doctor")
    table.add_row("flowbp", __version__)
    table.add_row("python", platform.python_version())
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "triton"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    cuda = torch.cuda.is_available()
    table.add_row("device", torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads")
    table.add_row("matrix products", math_library())
    for name, runs, why in backend.report():
        table.add_row(f"kernels: {name}", f"{'runs' if runs else 'cannot run'}: {why}")
    return table


def non_defaults(built) -> str:
    """The fields of a dataclass that differ from its defaults, on one line; those of a nested one as field.field."""
    given, usual = (flatten(describe(each, METHODS)) for each in (built, type(built)()))
    return ", ".join(f"{key} {value}" for key, value in given.items() if usual.get(key) != value)
