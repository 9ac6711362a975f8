"""Pages and pictures: HTML that stands alone, what pages say of a run, and the page of an evaluation."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from flowbp.config import RunConfig, flatten
from flowbp.config.schema import RewardConfig
from flowbp.evaluation import figures
from flowbp.evaluation.scores import Scores
from flowbp.evaluation.templates import METRICS, TEMPLATES, by_metric, render
from flowbp.given import LARGEST, cut
from flowbp.runtime.environment import describe_environment, environment
from flowbp.runtime.files import write_file


def facts(config: RunConfig, **values: Any) -> Any:
    """What templates/facts.jinja says: `of_run`; `of_start` given where and on what it runs; `of_training` given the
    rows of metrics.jsonl; `of_evaluation` given its models and what it was made with. {label: text} each.
    """
    return TEMPLATES.get_template("facts.jinja").make_module(values | {"config": config})


def panels(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], smooth: bool = True) -> dict:
    """{title: picture} of each of `metrics` that the rows of any run hold."""
    pictures, logged = {}, {metric for rows in runs.values() for row in rows for metric in row}
    for metric in (metric for metric in metrics if metric in logged):
        about = METRICS.get("share" if metric.endswith("_share") else metric, {})
        title, unit = about.get("title", metric), about.get("unit", "mean score")
        pictures[title] = picture(figures.curves(runs, metric, title, unit, smooth))
    return pictures


def draw_samples(scores: Scores) -> figures.Figure:
    """The images that `scores` kept, with their prompts, framed by the checker's verdict if there is one."""
    checker = scores.values.get("checker")
    passed = [None if checker is None else bool(checker[i]) for i in range(len(scores.images))]
    return figures.sample_grid(scores.images.permute(0, 2, 3, 1).numpy(), [p.text for p in scores.prompts], passed)


def paired_samples(scores: Mapping[str, Scores], side: int = 256) -> list[dict[str, Any]]:
    """The images that all of `scores` kept, prompt by prompt, at most `side` pixels wide and high, with the checker's
    verdict or None: {"prompt", "pictures": [{"name", "source": a data: URI, "passed", "coarse": of few pixels}]}.
    """
    pairs = []
    for i in range(min((len(own.images) for own in scores.values()), default=0)):
        pictures = []
        for name, own in scores.items():
            image, png = Image.fromarray(own.images[i].permute(1, 2, 0).numpy()), io.BytesIO()
            checker = own.values.get("checker")
            image.thumbnail((side, side))
            image.save(png, "png")
            about = {"passed": None if checker is None else bool(checker[i]), "coarse": image.width < 128}
            pictures.append({"name": name, "source": as_data_uri(png.getvalue())} | about)
        pairs.append({"prompt": next(iter(scores.values())).prompts[i].text, "pictures": pictures})
    return pairs


def picture(figure: figures.Figure) -> str:
    """A figure as the data: URI of a PNG."""
    return as_data_uri(as_png(figure))


def as_png(figure: figures.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def read_png(path: Path) -> bytes:
    """The bytes of a PNG. Raises ValueError for any other file, and for a PNG that is cut off or too large to show."""
    try:
        with path.open("rb") as file:
            png = file.read(LARGEST)  # a longer one is then cut off
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no PNG that a page can show ({cut(error)}): remove it") from error
    return png


def as_data_uri(png: bytes) -> str:
    """The bytes of a PNG as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


# -- what a page says on top -------------------------------------------------------------------------------------------


def images_a_step(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> int:
    """Images of an optimizer step over all processes, as the run logged them; of one process where an older run logged
    none.
    """
    return rows[-1].get("images", config.data.batch_size * config.data.accumulate)


def describe_reward(spec: RewardConfig) -> str:
    """The reward model, and what its spec says beyond the defaults: "clip (model shapes, hinge 0.8)"."""
    return with_fields(spec.name, spec.model_dump(mode="json", exclude_defaults=True, exclude={"name"}))


def with_fields(name: str, fields: Mapping[str, Any]) -> str:
    """`name (field value, ...)`, without fields that are None."""
    given = {key: value for key, value in flatten(fields).items() if value is not None}
    said = ", ".join(key if value == {} else f"{key} {value}" for key, value in given.items())
    return f"{name} ({said})" if said else name


# -- the page of an evaluation -----------------------------------------------------------------------------------------


def write_evaluation(config: RunConfig, folder: Path, results: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """samples_<model>.png and report.html of an evaluation."""
    for name, own in scores.items():
        write_file(folder / f"samples_{name}.png", as_png(draw_samples(own)))
    about = results["models"][0]
    made_with = about["versions"] | {"commit": environment()["commit"], "device": about["device"]}
    page = render(
        "evaluation.html",
        name=folder.name,
        config=config,
        results=results,
        facts_of_evaluation=facts(config, models=list(scores), made_with=describe_environment(made_with)).of_evaluation,
        overall=by_metric(results["means"], "model"),
        pairs=paired_samples(scores),
        settings=yaml.safe_dump(about["settings"], sort_keys=False),
    )
    write_file(folder / "report.html", page)


# What templates of pages may call beside the filters of numbers.
SAID = (describe_environment, describe_reward, images_a_step, picture)
DRAWN = (figures.changes_of_runs, figures.strengths, figures.styles, paired_samples, panels)
TEMPLATES.filters |= {function.__name__: function for function in SAID}
TEMPLATES.globals |= {function.__name__: function for function in DRAWN}
