"""The report of a run: tables, curves and pictures in the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from flowbp.config import RunConfig, dump
from flowbp.evaluation import figures
from flowbp.evaluation.pages import as_data_uri, as_png, draw_samples, panels, render, training_facts
from flowbp.evaluation.scores import Difference, Scores
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.plan import SurrogatePlan
from flowbp.runtime.environment import describe_environment, environment
from flowbp.runtime.run_folder import RunFolder

__all__ = ["Report"]


class Report:
    """Collects what a run has to show; `write` puts it into the run's folder."""

    def __init__(self, config: RunConfig, folder: RunFolder, plan: SurrogatePlan, sigmas: list[float]):
        self.folder, self.config = folder, config
        self.plan_figure = figures.draw_plan(plan, sigmas, f"{config.method_name}: one plan of {len(sigmas) - 1} steps")
        self.grids: dict[str, Figure] = {}
        self.differences: list[dict[str, Any]] = []
        self.validation: dict[str, Any] | None = None

    def add_scores(self, name: str, scores: Scores) -> None:
        """Draw the images that `scores` kept as samples_<name>.png, and save all scores as scores_<name>.csv."""
        self.grids[name] = draw_samples(scores)
        self.folder.write(f"samples_{name}.png", as_png(self.grids[name]))
        self.folder.write(f"scores_{name}.csv", scores.as_csv())

    def add_comparison(self, differences: list[Difference]) -> None:
        """Keep the before/after table and save it as evaluation.json."""
        self.differences = [asdict(d) for d in differences]
        self.folder.write_json("evaluation.json", self.differences)

    def add_validation(self, summary: dict[str, Any]) -> None:
        """Keep what the sentinel saw and save it as validation.json."""
        self.validation = summary
        self.folder.write_json("validation.json", summary)

    def write(self) -> None:
        """Write plan.png and report.html."""
        if not self.folder.writes:
            return
        self.folder.write("plan.png", as_png(self.plan_figure))
        rows, name, seen = self.folder.metrics(), self.folder.path.name, self.validation
        page = render(
            "report.html",
            name=name,
            facts_of_run=training_facts(self.config, rows) | {"made with": describe_environment(environment())},
            differences=self.differences,
            validation=seen,
            evaluation=self.config.evaluation,
            held_out=seen and panels({"held-out prompts": seen["means"]}, self.held_out, smooth=False),
            plan=as_data_uri(self.plan_figure),
            curves=panels({name: rows}, [*self.config.reward, *self.monitors, "grad_norm", "d_j", "d_0"]),
            window=max(1, len(rows) // 10),
            trained=" and ".join(self.config.reward),
            grids={name: as_data_uri(figure) for name, figure in self.grids.items()},
            config=dump(self.config),
        )
        self.folder.write("report.html", page)

    @property
    def monitors(self) -> list[str]:
        return list(self.config.evaluation.monitors) if self.config.evaluation else []

    @property
    def held_out(self) -> list[str]:
        """The metrics of the periodic evaluations, in the order of the tables."""
        return [*self.config.reward, *self.monitors, "checker", *IMAGE_STATISTICS]
