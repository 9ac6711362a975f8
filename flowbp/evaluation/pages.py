"""Pages and pictures: HTML that stands alone, and what the page of an evaluation says."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from matplotlib.figure import Figure

from flowbp.config import RewardConfig, RolloutConfig, RunConfig, flatten
from flowbp.evaluation import figures
from flowbp.evaluation.numbers import (
    between,
    direction,
    duration,
    notes,
    number,
    p_text,
    scale_of,
    scale_of_change,
    shown,
    signed,
)
from flowbp.guidance import Guidance
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.runtime.environment import describe_environment, environment
from flowbp.runtime.files import write_file

if TYPE_CHECKING:
    from flowbp.evaluation.scores import Scores

__all__ = [
    "as_data_uri",
    "as_png",
    "describe_reward",
    "draw_samples",
    "images_a_step",
    "panels",
    "render",
    "training_facts",
    "with_fields",
    "write_evaluation",
]

AXES = {  # metric -> title of its panel, and what its vertical axis counts; any other is a score
    "grad_norm": ("gradient norm", "L2 norm before clipping"),
    "d_j": ("residual d_j", "mean gap, latent units"),
    "d_0": ("residual d_0", "mean gap, latent units"),
    "checker": ("checker", "share of images"),
} | {name: (name, "mean over images") for name in IMAGE_STATISTICS}


def render(template: str, **values: Any) -> str:
    """A page of flowbp/templates, as HTML."""
    loader = jinja2.PackageLoader("flowbp")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "signed": signed, "between": between, "scale": scale_of, "p": p_text}
    environment.filters["change_scale"] = scale_of_change
    environment.filters |= {"direction": direction, "shown": shown, "notes": notes}
    environment.globals["statistics"] = list(IMAGE_STATISTICS)
    return environment.get_template(template).render(**values)


def panels(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], smooth: bool = True
) -> dict[str, str]:
    """Title -> picture of each of `metrics` that the rows of any run hold."""
    logged = {metric for rows in runs.values() for row in rows for metric in row}
    axes = {metric: AXES.get(metric, (metric, "mean score")) for metric in metrics if metric in logged}
    return {
        title: as_data_uri(figures.curves(runs, metric, title, unit, smooth)) for metric, (title, unit) in axes.items()
    }


def draw_samples(scores: Scores) -> Figure:
    """The images that `scores` kept, with their prompts, framed by the checker's verdict where there is one."""
    checker = scores.values.get("checker")
    passed = [None if checker is None else bool(checker[i]) for i in range(len(scores.images))]
    captions = [prompt.text for prompt in scores.prompts[: len(scores.images)]]
    return figures.sample_grid(scores.images.permute(0, 2, 3, 1).numpy(), captions, passed)


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a data: URI."""
    return "data:image/png;base64," + base64.b64encode(as_png(figure)).decode()


# -- what a page says on top ---------------------------------------------------------------------------------------


def training_facts(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was trained, how, and what it took: {label: text}. rows: of metrics.jsonl."""
    tuned = f"LoRA of rank {config.tuning.rank}" if config.tuning.mode == "lora" else "all weights"
    network, images = f"{config.backbone.name}, {config.backbone.dtype}", images_a_step(config, rows)
    size, seconds = config.rollout, sum(row["seconds"] for row in rows)
    return {
        "method": config.method_name,
        "model": f"{network}; trained: {tuned}, learning rate {config.optimizer.lr:g}",
        "reward": "; ".join(
            ("" if name == "reward" else f"{name}: ") + describe_reward(spec) for name, spec in config.reward.items()
        ),
        "training": f"{len(rows)} of {config.steps} steps, {images} images each, prompts {config.data.prompts}",
        "rollout": describe_rollout(size, config.guidance),
        "seed": str(config.seed),
        "took": f"{duration(seconds)} of training, at most {max(row['peak_mb'] for row in rows):,.0f} MB of memory",
    }


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


def describe_rollout(size: RolloutConfig, guidance: Guidance) -> str:
    """The sampler's steps and noise levels, the size of its images, and its guidance."""
    levels = {"published": "published noise levels", "pipeline": "noise levels of the pipeline"}[size.sigmas]
    scales = [f"{guidance.scale:g}"] if guidance.active or guidance.embedded is None else []
    scales += [f"{guidance.embedded:g} (embedded)"] if guidance.embedded is not None else []
    return (
        f"{size.num_steps} steps on the {levels}, {size.height} x {size.width} pixels, guidance {' and '.join(scales)}"
    )


def images_a_step(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> int:
    """Images of an optimizer step over all processes, as the run logged them; those of one process where an older run
    did not.
    """
    return rows[-1].get("images", config.data.batch_size * config.data.accumulate)


def describe_reward(spec: RewardConfig) -> str:
    """The reward model, and what its spec says beyond the defaults: "clip (model shapes, hinge 0.8)"."""
    return with_fields(spec.name, spec.model_dump(mode="json", exclude_defaults=True, exclude={"name"}))


def with_fields(name: str, fields: Mapping[str, Any]) -> str:
    """`name (field value, ...)`, without fields that are None."""
    said = ", ".join(
        key if value == {} else f"{key} {value}" for key, value in flatten(fields).items() if value is not None
    )
    return f"{name} ({said})" if said else name


# -- the page of an evaluation -------------------------------------------------------------------------------------


def write_evaluation(config: RunConfig, folder: Path, results: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """samples_<model>.png and report.html of what `flowbp eval` found."""
    grids = {name: draw_samples(found) for name, found in scores.items()}
    for name, figure in grids.items():
        write_file(folder / f"samples_{name}.png", as_png(figure))
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
    write_file(folder / "report.html", page)
