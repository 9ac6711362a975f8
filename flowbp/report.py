"""The report of a run: pictures, the before/after table, and one self-contained page."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from matplotlib.figure import Figure
from torch import Tensor

from flowbp import figures
from flowbp.config import RunConfig, dump
from flowbp.plan import SurrogatePlan

if TYPE_CHECKING:
    from flowbp.evaluation import Difference, Scores

__all__ = ["Report"]

CURVES = {"grad_norm": "gradient norm", "d_j": "residual d_j", "d_0": "residual d_0"}


class Report:
    """Collects what a run has to show; `write` puts it into the run's folder."""

    def __init__(self, config: RunConfig, plan: SurrogatePlan, sigmas: list[float]):
        self.output, self.config = config.output, config
        self.plan_figure = figures.draw_plan(plan, sigmas, f"{config.method_name}: one plan of {len(sigmas) - 1} steps")
        self.grids: dict[str, Figure] = {}
        self.differences: list[Difference] = []

    def add_grid(self, name: str, images: Tensor, scores: Scores) -> None:
        """Draw images [n, 3, H, W], the first ones that were scored, and save them as samples_<name>.png."""
        checker = scores.values.get("checker")
        passed = [None if checker is None else bool(checker[i]) for i in range(len(images))]
        captions = [prompt.text for prompt in scores.prompts[: len(images)]]
        self.grids[name] = figures.sample_grid(images.permute(0, 2, 3, 1).cpu().numpy(), captions, passed)
        self.grids[name].savefig(self.output / f"samples_{name}.png", dpi=110)

    def add_comparison(self, differences: list[Difference]) -> None:
        """Keep the before/after table and save it as evaluation.json."""
        self.differences = differences
        rows = [asdict(d) | {"mean": d.mean} for d in differences]
        (self.output / "evaluation.json").write_text(json.dumps(rows, indent=1))

    def write(self) -> Path:
        """Write plan.png and report.html; returns the page's path."""
        self.plan_figure.savefig(self.output / "plan.png", dpi=110)
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        environment = jinja2.Environment(loader=jinja2.PackageLoader("flowbp"), autoescape=True)
        page = environment.get_template("report.html").render(
            name=self.output.name,
            method=self.config.method_name,
            rows=rows,
            seconds=sum(row["seconds"] for row in rows),
            differences=self.differences,
            plan=as_data_uri(self.plan_figure),
            curves=as_data_uri(figures.curves(rows, self.curve_titles())),
            trained=" and ".join(self.config.reward),
            grids={name: as_data_uri(figure) for name, figure in self.grids.items()},
            config=dump(self.config),
        )
        path = self.output / "report.html"
        scratch = path.with_suffix(".partial")
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, path)
        return path

    def curve_titles(self) -> dict[str, str]:
        """Metric -> title of its panel: what was trained on, the optimisation, and the monitors."""
        trained = {name: f"training {name}" for name in self.config.reward}
        return trained | CURVES | {d.metric: d.metric for d in self.differences if d.metric not in trained}


def as_data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a data: URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
