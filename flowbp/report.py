"""Pages and pictures: the report of a run, of an evaluation, and of several runs side by side. Every page stands alone."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from matplotlib.figure import Figure

from flowbp import checkpoint, figures
from flowbp.config import RunConfig, dump
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.plan import SurrogatePlan

if TYPE_CHECKING:
    from flowbp.evaluation import Difference, Scores

__all__ = ["Report", "between", "notes", "number", "p_text", "render", "shown", "signed", "to_json", "write_evaluation"]

CURVES = {"grad_norm": "gradient norm", "d_j": "residual d_j", "d_0": "residual d_0"}


class Report:
    """Collects what a run has to show; `write` puts it into the run's folder."""

    def __init__(self, config: RunConfig, plan: SurrogatePlan, sigmas: list[float]):
        self.output, self.config = config.output, config
        self.plan_figure = figures.draw_plan(plan, sigmas, f"{config.method_name}: one plan of {len(sigmas) - 1} steps")
        self.grids: dict[str, Figure] = {}
        self.differences: list[dict[str, Any]] = []
        self.validation: dict[str, Any] | None = None

    def add_grid(self, name: str, scores: Scores) -> None:
        """Draw the images that `scores` kept, and save them as samples_<name>.png."""
        self.grids[name] = draw_samples(scores)
        checkpoint.replace_file(self.output / f"samples_{name}.png", as_png(self.grids[name]))

    def add_comparison(self, differences: list[Difference]) -> None:
        """Keep the before/after table and save it as evaluation.json."""
        self.differences = [asdict(d) for d in differences]
        checkpoint.replace_file(self.output / "evaluation.json", to_json(self.differences))

    def add_validation(self, summary: dict[str, Any]) -> None:
        """Keep what the sentinel saw and save it as validation.json."""
        self.validation = summary
        checkpoint.replace_file(self.output / "validation.json", to_json(summary))

    def write(self) -> Path:
        """Write plan.png and report.html; returns the page's path."""
        self.plan_figure.savefig(self.output / "plan.png", dpi=110)
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        page = render(
            "report.html",
            name=self.output.name,
            method=self.config.method_name,
            rows=rows,
            seconds=sum(row["seconds"] for row in rows),
            differences=self.differences,
            validation=self.validation,
            best_metric=self.config.evaluation and self.config.evaluation.best,
            patience=self.config.evaluation and self.config.evaluation.patience,
            held_out=self.validation and as_data_uri(held_out_curves(self.validation)),
            plan=as_data_uri(self.plan_figure),
            curves=as_data_uri(figures.curves(rows, self.curve_titles())),
            trained=" and ".join(self.config.reward),
            grids={name: as_data_uri(figure) for name, figure in self.grids.items()},
            config=dump(self.config),
        )
        path = self.output / "report.html"
        checkpoint.replace_file(path, page)
        return path

    def curve_titles(self) -> dict[str, str]:
        """Metric -> title of its panel: what was trained on, the optimisation, and the monitors."""
        trained = {name: f"training {name}" for name in self.config.reward}
        return trained | CURVES | {d["metric"]: d["metric"] for d in self.differences if d["metric"] not in trained}


def write_evaluation(config: RunConfig, folder: Path, results: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """samples_<model>.png and report.html of what `flowbp eval` found."""
    grids = {name: draw_samples(found) for name, found in scores.items()}
    for name, figure in grids.items():
        checkpoint.replace_file(folder / f"samples_{name}.png", as_png(figure))
    overall: dict[str, list[dict[str, Any]]] = {}
    for row in results["means"]:
        if row["category"] == "all":
            overall.setdefault(row["metric"], []).append(row)
    settings = results["models"][0]["settings"]
    page = render(
        "evaluation.html",
        name=folder.name,
        settings=settings,
        models=results["models"],
        overall=overall,
        by_model={name: [row for row in results["changes"] if row["model"] == name] for name in list(scores)[1:]},
        grids={name: as_data_uri(figure) for name, figure in grids.items()},
        trained=" and ".join(config.reward),
        config=yaml.safe_dump(settings, sort_keys=False),
    )
    checkpoint.replace_file(folder / "report.html", page)


def held_out_curves(validation: Mapping[str, Any]) -> Figure:
    """One panel a metric of the periodic evaluations."""
    rows = validation["means"]
    return figures.overlaid_curves({"held-out prompts": rows}, {key: key for key in rows[0] if key != "step"})


def draw_samples(scores: Scores) -> Figure:
    """The images that `scores` kept, with their prompts, framed by the checker's verdict where there is one."""
    checker = scores.values.get("checker")
    passed = [None if checker is None else bool(checker[i]) for i in range(len(scores.images))]
    captions = [prompt.text for prompt in scores.prompts[: len(scores.images)]]
    return figures.sample_grid(scores.images.permute(0, 2, 3, 1).numpy(), captions, passed)


# -- pages and numbers -------------------------------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """A page of flowbp/templates, as HTML."""
    loader = jinja2.PackageLoader("flowbp")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "signed": signed, "between": between, "p": p_text, "direction": direction}
    environment.filters |= {"shown": shown, "notes": notes}
    environment.globals["statistics"] = list(IMAGE_STATISTICS)
    return environment.get_template(template).render(**values)


def number(value: float | None, sign: str = "") -> str:
    """Five digits, at most three of them decimals; two digits of what is smaller than .01. A dash for what is not a number."""
    if undefined(value):
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0  # 10^magnitude <= |value|
    if magnitude < -4:
        return f"{value:{sign}.1e}"
    decimals = 1 - magnitude if magnitude < -2 else min(3, max(0, 4 - magnitude))
    return f"{value + 0.0:{sign}.{decimals}f}"  # + 0.0: no negative zero


def signed(value: float | None) -> str:
    return number(value, "+")


def between(ends: Sequence[float | None]) -> str:
    """An interval; a dash where there are too few prompts for one, and words where they do not differ."""
    if undefined(ends[0]):
        return "–"
    return "all equal" if ends[0] == ends[1] else f"[{number(ends[0])}, {number(ends[1])}]"


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of a table of means or changes must know of its gaps, a line each."""
    found, overall = [], {row["metric"]: row for row in rows if row["category"] == "all"}
    for metric, row in overall.items():
        everyone = row["missing"] + row["count"]
        if row["missing"] and metric == "diversity":
            found.append(f"diversity: {row['missing']} of {everyone} images are the only one of their prompt, and are left out.")
        elif row["missing"]:
            found.append(f"{metric}: {row['missing']} of {everyone} images have no finite score, and are left out.")
    if "diversity" not in overall:
        found.append("diversity compares images of one prompt, and here each has one: let evaluation.samples exceed the number of prompts.")
    if any(undefined(row["low"]) for row in shown(rows)):
        found.append("–: fewer than six prompts bear no 95 % interval.")
    if any(row["low"] == row["high"] for row in shown(rows) if not undefined(row["low"])):
        found.append("all equal: no prompt differs from another, which is not certainty: none of n leaves up to 3 / n.")
    return found


def p_text(p: float | None) -> str:
    return "–" if undefined(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def direction(row: Mapping[str, Any]) -> int:
    """1 or -1 where the interval of a change excludes zero and p < .05, else 0: with a few prompts the interval alone is too narrow."""
    if undefined(row["low"]) or row["p_value"] >= 0.05:
        return 0
    return int(row["low"] > 0) - int(row["high"] < 0)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a table for people: image statistics over all images only."""
    return [row for row in rows if row["category"] == "all" or row["metric"] not in IMAGE_STATISTICS]


def undefined(value: float | None) -> bool:
    """nan, or the null that stands for it in JSON."""
    return value is None or math.isnan(value)


def to_json(value: Any) -> str:
    """JSON text in which what is not a number is null."""
    return json.dumps(without_nan(value), indent=1) + "\n"


def without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a data: URI."""
    return "data:image/png;base64," + base64.b64encode(as_png(figure)).decode()
