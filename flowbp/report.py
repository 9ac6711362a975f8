"""Pages and pictures: the report of a run, of an evaluation, and of several runs side by side. Every page stands alone."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import yaml
from matplotlib.figure import Figure

import flowbp
from flowbp import checkpoint, figures
from flowbp.config import RewardConfig, RolloutConfig, RunConfig, dump, flatten
from flowbp.guidance import Guidance
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.plan import SurrogatePlan
from flowbp_kernels.bench import machine

if TYPE_CHECKING:
    from flowbp.evaluation import Difference, Scores

__all__ = [
    "Report",
    "between",
    "describe_environment",
    "describe_reward",
    "environment",
    "notes",
    "number",
    "p_text",
    "panels",
    "record_environment",
    "render",
    "scale_of",
    "scale_of_change",
    "shown",
    "signed",
    "to_json",
    "training_facts",
    "with_fields",
    "write_evaluation",
]

ENVIRONMENT = "environment.json"
AXES = {  # metric -> title of its panel, and what its vertical axis counts; any other is a score
    "grad_norm": ("gradient norm", "L2 norm before clipping"),
    "d_j": ("residual d_j", "mean gap, latent units"),
    "d_0": ("residual d_0", "mean gap, latent units"),
    "checker": ("checker", "share of images"),
} | {name: (name, "mean over images") for name in IMAGE_STATISTICS}


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
            facts_of_run=training_facts(self.config, rows) | {"made with": describe_environment(environment())},
            differences=self.differences,
            validation=self.validation,
            evaluation=self.config.evaluation,
            held_out=self.validation and panels({"held-out prompts": self.validation["means"]}, self.held_out, smooth=False),
            plan=as_data_uri(self.plan_figure),
            curves=panels({self.output.name: rows}, [*self.config.reward, *self.monitors, "grad_norm", "d_j", "d_0"]),
            window=max(1, len(rows) // 10),
            trained=" and ".join(self.config.reward),
            grids={name: as_data_uri(figure) for name, figure in self.grids.items()},
            config=dump(self.config),
        )
        path = self.output / "report.html"
        checkpoint.replace_file(path, page)
        return path

    @property
    def monitors(self) -> list[str]:
        return list(self.config.evaluation.monitors) if self.config.evaluation else []

    @property
    def held_out(self) -> list[str]:
        """What the periodic evaluations score, as the tables order it."""
        return [*self.config.reward, *self.monitors, "checker", *IMAGE_STATISTICS]


# -- what a page says on top -------------------------------------------------------------------------------------------------------


def training_facts(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was trained, how, and what it took: {label: text}. rows: of metrics.jsonl."""
    tuned = f"LoRA of rank {config.tuning.rank}" if config.tuning.mode == "lora" else "all weights"
    size, seconds = config.rollout, sum(row["seconds"] for row in rows)
    return {
        "method": config.method_name,
        "model": f"{config.backbone.name}, {config.backbone.dtype}; trained: {tuned}, learning rate {config.optimizer.lr:g}",
        "reward": "; ".join(("" if name == "reward" else f"{name}: ") + describe_reward(spec) for name, spec in config.reward.items()),
        "training": f"{len(rows)} of {config.steps} steps, {images_a_step(config, rows)} images each, prompts {config.data.prompts}",
        "rollout": describe_rollout(size, config.guidance),
        "seed": str(config.seed),
        "took": f"{duration(seconds)} of training, at most {max(row['peak_mb'] for row in rows):,.0f} MB of memory",
    }


def describe_rollout(size: RolloutConfig, guidance: Guidance) -> str:
    """The sampler's steps and noise levels, the size of its images, and its guidance."""
    levels = {"published": "published noise levels", "pipeline": "noise levels of the pipeline"}[size.sigmas]
    scales = [f"{guidance.scale:g}"] if guidance.active or guidance.embedded is None else []
    scales += [f"{guidance.embedded:g} (embedded)"] if guidance.embedded is not None else []
    return f"{size.num_steps} steps on the {levels}, {size.height} x {size.width} pixels, guidance {' and '.join(scales)}"


def images_a_step(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> int:
    """Images of an optimizer step over all processes, as the run logged them; those of one process where an older run did not."""
    return rows[-1].get("images", config.data.batch_size * config.data.accumulate)


def describe_reward(spec: RewardConfig) -> str:
    """The reward model, and what its spec says beyond the defaults: "clip (model shapes, hinge 0.8)"."""
    return with_fields(spec.name, spec.model_dump(mode="json", exclude_defaults=True, exclude={"name"}))


def with_fields(name: str, fields: Mapping[str, Any]) -> str:
    """`name (field value, ...)`, without fields that are None."""
    said = ", ".join(key if value == {} else f"{key} {value}" for key, value in flatten(fields).items() if value is not None)
    return f"{name} ({said})" if said else name


def environment() -> dict[str, Any]:
    """What ran: flowbp's version and commit, the libraries and the device."""
    about = machine("cuda" if torch.cuda.is_available() else "cpu")
    libraries = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers")}
    return {"flowbp": flowbp.__version__, "commit": about["commit"]} | about["versions"] | libraries | {"device": about["device"]}


def record_environment(folder: Path) -> None:
    """Keep what runs as environment.json; a resumed run's is that of its last part."""
    checkpoint.replace_file(folder / ENVIRONMENT, to_json(environment()))


def describe_environment(about: Mapping[str, Any]) -> str:
    """One line of `environment`."""
    return ", ".join(f"{value}" if key == "device" else f"{key} {value}" for key, value in about.items() if value)


def duration(seconds: float) -> str:
    """Two figures of it: 45 s, 12.5 min, 3.2 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def write_evaluation(config: RunConfig, folder: Path, results: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """samples_<model>.png and report.html of what `flowbp eval` found."""
    grids = {name: draw_samples(found) for name, found in scores.items()}
    for name, figure in grids.items():
        checkpoint.replace_file(folder / f"samples_{name}.png", as_png(figure))
    overall: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["means"]:
        if row["category"] == "all":
            overall.setdefault(row["metric"], {})[row["model"]] = row
    about = results["models"][0]
    made_with = describe_environment(about["versions"] | {"commit": environment()["commit"], "device": about["device"]})
    page = render(
        "evaluation.html",
        name=folder.name,
        facts_of_evaluation=evaluation_facts(config, list(scores)) | {"made with": made_with},
        models=results["models"],
        overall=overall,
        by_model={name: [row for row in results["changes"] if row["model"] == name] for name in list(scores)[1:]},
        grids={name: as_data_uri(figure) for name, figure in grids.items()},
        trained=" and ".join(config.reward),
        config=yaml.safe_dump(about["settings"], sort_keys=False),
        checker=config.evaluation.checker,
    )
    checkpoint.replace_file(folder / "report.html", page)


def evaluation_facts(config: RunConfig, models: Sequence[str]) -> dict[str, str]:
    """What was scored, and how: {label: text}."""
    scored, size = config.evaluation, config.evaluation_rollout
    return {
        "models": ", ".join(models),
        "backbone": f"{config.backbone.name}, {config.backbone.dtype}",
        "prompts": f"{scored.prompts}, {scored.samples} images a model",
        "rollout": describe_rollout(size, config.guidance),
        "seed": str(scored.seed),
    }


# -- pictures ----------------------------------------------------------------------------------------------------------------------


def panels(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], smooth: bool = True) -> dict[str, str]:
    """Title -> picture of each of `metrics` that the rows of any run hold."""
    logged = {metric for rows in runs.values() for row in rows for metric in row}
    axes = {metric: AXES.get(metric, (metric, "mean score")) for metric in metrics if metric in logged}
    return {title: as_data_uri(figures.curves(runs, metric, title, unit, smooth)) for metric, (title, unit) in axes.items()}


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
    environment.filters |= {"number": number, "signed": signed, "between": between, "scale": scale_of, "p": p_text}
    environment.filters["change_scale"] = scale_of_change
    environment.filters |= {"direction": direction, "shown": shown, "notes": notes}
    environment.globals["statistics"] = list(IMAGE_STATISTICS)
    return environment.get_template(template).render(**values)


def number(value: float | None, scale: float = 1.0, sign: str = "") -> str:
    """Three decimals; two figures of `scale` where that is below .01, three from 100 on. A dash for nan."""
    if undefined(value):
        return "–"
    magnitude = math.floor(math.log10(abs(scale))) if scale else 0  # 10^magnitude <= |scale|
    decimals = 1 - magnitude if magnitude < -2 else 3 if magnitude < 2 else max(0, 2 - magnitude)
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0: no negative zero


def signed(value: float | None, scale: float = 1.0) -> str:
    return number(value, scale, "+")


def between(ends: Sequence[float | None], scale: float = 1.0) -> str:
    """An interval; a dash where there are too few prompts for one, and words where they do not differ."""
    if undefined(ends[0]):
        return "–"
    return "all equal" if ends[0] == ends[1] else f"[{number(ends[0], scale)}, {number(ends[1], scale)}]"


def scale_of(row: Mapping[str, Any]) -> float:
    """The size of the means of a row."""
    return size_of(row, "mean", "before", "after")


def scale_of_change(row: Mapping[str, Any]) -> float:
    """The size of a row's change and its interval, which may be far smaller than its means."""
    return size_of(row, "change", "low", "high")


def size_of(row: Mapping[str, Any], *keys: str) -> float:
    return max((abs(row[key]) for key in keys if not undefined(row.get(key))), default=1.0)


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
        found.append("all equal: no prompt differs from another, which is not certainty: 0 of n successes leave up to 3 / n.")
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
