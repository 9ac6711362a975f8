"""`flowbp compare`: several finished runs in one table and one page, and what in their configs makes the comparison
unfair.

What the runs are compared for is the method: its fields are listed as the point. Any other difference that reaches the
weights or the scores is named: a method that trained on more images, under other guidance, or was scored on other
prompts has not been compared.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowbp.config import ConfigError, RewardConfig, RunConfig, by_name, dump, flatten, load
from flowbp.evaluation import figures
from flowbp.evaluation.pages import describe_reward, images_a_step, panels, render, training_facts, with_fields
from flowbp.evaluation.scores import Scores, compare, summarise
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.runtime.environment import ENVIRONMENT, describe_environment
from flowbp.runtime.files import without_nan, write_file
from flowbp.runtime.run_folder import mark_folder

__all__ = ["Contrast", "Run", "compare_runs", "contrast", "grouped", "read_run"]

THE_POINT = ("method",)
BOOKKEEPING = (  # keys that reach neither weights nor scores, up to rounding; of batches, the images of a step count
    "output",
    "checkpoint_every",
    "memory",
    "compile",
    "data.batch_size",
    "data.accumulate",
    "data.embeddings",
    "data.cache",
    "evaluation.batch_size",
    "evaluation.grid",
    "evaluation.watch",
)
SEEN = "memory.vae_tiling"  # by the reward: the seams of tiles
STOPPING = tuple(
    f"evaluation.{key}" for key in ("best", "patience", "every", "validation_prompts", "validation_samples")
)
EVALUATED = "final evaluation"
IMAGES_A_STEP = "images a step"  # processes x data.batch_size x data.accumulate
REASONS = {
    IMAGES_A_STEP: "another number of images an optimizer step",
    "steps": "another number of optimizer steps",
    "seed": "other prompts, noise and initial weights; compare means over several seeds instead",
    "guidance": "another velocity, and perhaps another gradient",
    "rollout": "another sampler or resolution",
    "backbone": "another model",
    "reward": "another objective",
    "data": "other training prompts",
    EVALUATED: "no scores to compare",
    **dict.fromkeys(STOPPING, "another rule for when to stop"),
    "evaluation": "scored on other samples or by other metrics",
    "": "another training recipe",
}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. rows: of metrics.jsonl. before, after: its final evaluation, if it made one.
    environment: what made it.
    """

    name: str
    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    before: Scores | None
    after: Scores | None
    environment: dict[str, Any]


def read_run(folder: Path, name: str) -> Run:
    """Raises FileNotFoundError for a folder that holds no run, or one that has not started, ConfigError for one of
    another version.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: pass the folders of runs")
    for file in ("config.yaml", "metrics.jsonl"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {file}, so it is no run: pass the folders that flowbp train wrote (its output)"
            )
    try:
        config = load(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.yaml'} is not of this version of flowbp: {error}") from None
    *lines, _unfinished = (
        (folder / "metrics.jsonl").read_text().split("\n")
    )  # a run that still writes may be in the middle of a line
    if not lines:
        raise FileNotFoundError(f"{folder}/metrics.jsonl is empty: the run has not taken a step")
    tables = (folder / f"scores_{side}.csv" for side in ("before", "after"))
    scores = (read_scores(table) if table.is_file() else None for table in tables)
    recorded = folder / ENVIRONMENT
    environment = json.loads(recorded.read_text()) if recorded.is_file() else {}
    return Run(name, folder, config, [json.loads(line) for line in lines], *scores, environment)


def read_scores(path: Path) -> Scores:
    """Raises ValueError for a table that is cut off or has other columns."""
    try:
        return Scores.read_csv(path)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole table of scores ({error}): move it away to compare without it") from None


# -- configs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Keys in which configs differ: key -> the value of each run. unfair: also why."""

    point: dict[str, list[Any]]
    unfair: dict[str, tuple[list[Any], str]]
    bookkeeping: dict[str, list[Any]]


def contrast(configs: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Contrast:
    """Sort the differences of nested configs into the point (the method), what is unfair, and what changes no result.

    images: those of an optimizer step, of each run.
    """
    configs = [dict(config) for config in configs]
    if (
        len({tuple(by_name(config["reward"])) for config in configs}) > 1
    ):  # one against several, or others: field by field says nothing
        for config in configs:
            config["reward"] = objective(config["reward"])
    if len({config["method"]["name"] for config in configs}) > 1:  # other methods have other fields
        for config in configs:
            config["method"] = with_fields(
                config["method"]["name"], {k: v for k, v in config["method"].items() if k != "name"}
            )
    flat = [
        flatten(scored) | {IMAGES_A_STEP: count} for scored, count in zip(with_evaluation(configs), images, strict=True)
    ]
    early_stops = any(values.get("evaluation.patience") is not None for values in flat)
    found = Contrast({}, {}, {})
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [one.get(key) for one in flat]
        if all(value == values[0] for value in values):
            continue
        if within(key, THE_POINT):
            found.point[key] = values
        elif (within(key, BOOKKEEPING) and key != SEEN) or (key in STOPPING and not early_stops):
            found.bookkeeping[key] = values
        else:
            found.unfair[key] = (
                values,
                next(why for prefix, why in REASONS.items() if within(key, (prefix,)) or not prefix),
            )
    return found


def with_evaluation(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Configs that say in one key whether they have an evaluation; those without get the settings of the first that has
    one, unstopped.
    """
    settings = next((config["evaluation"] for config in configs if config["evaluation"] is not None), None)
    without = settings and settings | {"patience": None}
    return [
        dict(config)
        | ({EVALUATED: "none", "evaluation": without} if config["evaluation"] is None else {EVALUATED: "made"})
        for config in configs
    ]


def objective(rewards: Mapping[str, Any]) -> str:
    """The loss in words: "one reward: clip (hinge 0.8)", "2 rewards: clip + pickscore (weight 0.5)"."""
    terms = [describe_reward(RewardConfig(**spec)) for spec in by_name(rewards).values()]
    return f"{'one reward' if len(terms) == 1 else f'{len(terms)} rewards'}: {' + '.join(terms)}"


def grouped(values: Sequence[Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(value, the runs that have it) for each value: readable however many runs there are. A dash stands for a key that
    a run lacks.
    """
    texts = ["–" if value is None else str(value) for value in values]
    return [
        (text, ", ".join(name for name, own in zip(names, texts, strict=True) if own == text))
        for text in dict.fromkeys(texts)
    ]


def within(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


# -- the comparison
# ----------------------------------------------------------------------------------------------------------------


def compare_runs(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare at least two runs, write comparison.json and comparison.html into `out`, and return what the former
    holds.

    {"runs": what each is and what it took, "point", "unfair", "bookkeeping", "warnings", "means",
    "changes": paired with the first run, where samples agree}
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two runs or more, got {len(folders)}")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    mark_folder(out, "flowbp compare")
    images = {run.name: images_a_step(run.config, run.rows) for run in runs}
    first, found = runs[0], contrast([yaml.safe_load(dump(run.config)) for run in runs], list(images.values()))
    scored = {run.name: run.after for run in runs if run.after is not None}
    paired = [run for run in runs[1:] if same_samples(run, first)]
    base = {f"{first.name} before training": first.before} if first.before is not None else {}
    results = {
        "runs": [about(run) | {"images": images[run.name]} for run in runs],
        "point": found.point,
        "unfair": {key: {"values": values, "why": why} for key, (values, why) in found.unfair.items()},
        "bookkeeping": found.bookkeeping,
        "warnings": run_warnings(runs, paired),
        "means": [{"run": name} | asdict(row) for name, scores in (base | scored).items() for row in summarise(scores)],
        "changes": [
            {"run": r.name, "against": first.name} | asdict(row)
            for r in paired
            for row in compare(first.after, r.after)
        ],
    }
    results = without_nan(results)
    write_file(out / "comparison.json", json.dumps(results, indent=1) + "\n")
    write_file(out / "comparison.html", page(runs, results))
    return results


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many of them as it takes to tell them apart. Raises ValueError for equal
    folders.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = dict.fromkeys(str(folder) for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1)
    raise ValueError(f"a run is compared with itself: {', '.join(twice)}; name each folder once")


def same_samples(run: Run, first: Run) -> bool:
    one, other = run.after, first.after
    return one is not None and other is not None and (one.prompts, one.seeds) == (other.prompts, other.seeds)


def about(run: Run) -> dict[str, Any]:
    """What a run is and what it took: median seconds a step, and the highest peak memory in MB."""
    seconds, peak = float(np.median([row["seconds"] for row in run.rows])), max(row["peak_mb"] for row in run.rows)
    settings = {
        "method": run.config.method_name,
        "steps": len(run.rows),
        "seed": run.config.seed,
        "environment": run.environment,
    }
    return {"name": run.name, "folder": str(run.folder)} | settings | {"seconds_a_step": seconds, "peak_mb": peak}


def run_warnings(runs: Sequence[Run], paired: Sequence[Run]) -> list[str]:
    """What a reader of the table must know before its numbers."""
    first = runs[0]
    found = [
        f"{run.name} has taken {len(run.rows)} of {run.config.steps} steps"
        for run in runs
        if len(run.rows) != run.config.steps
    ]
    unscored = [run.name for run in runs if run.after is None]
    if unscored:
        command = f"flowbp eval {first.folder} " + " ".join(f"--weights {run.name}={run.folder}" for run in runs)
        found.append(
            f"no final evaluation (scores_after.csv): {', '.join(unscored)}. To score runs on the same samples: "
            f"{command}"
        )
    found += [
        f"{run.name} was scored on other prompts or seeds than {first.name}: no paired test"
        for run in runs[1:]
        if run.after is not None and first.after is not None and run not in paired
    ]
    made_with = [describe_environment(run.environment) or "not recorded" for run in runs]
    if len(set(made_with)) > 1:
        parts = grouped(made_with, [run.name for run in runs])
        found.append(
            "made with different versions or devices: " + "; ".join(f"{names}: {text}" for text, names in parts)
        )
    return found


def page(runs: Sequence[Run], results: Mapping[str, Any]) -> str:
    names = [run.name for run in runs]
    found = dict.fromkeys(row["metric"] for row in results["means"])
    overall = {
        metric: {r["run"]: r for r in results["means"] if (r["metric"], r["category"]) == (metric, "all")}
        for metric in found
    }
    metrics = dict.fromkeys([*(name for run in runs for name in run.config.reward), *found, "grad_norm"])
    grids = {run.name: run.folder / "samples_after.png" for run in runs}
    return render(
        "comparison.html",
        name=f"{names[0]} against {' and '.join(names[1:]) if len(names) < 4 else f'{len(names) - 1} runs'}",
        results=results,
        facts_of_first=training_facts(runs[0].config, runs[0].rows),
        styles=figures.styles(names),
        made_with={run.name: describe_environment(run.environment) or "not recorded" for run in runs},
        differences=lambda values: grouped(values, names),
        overall=overall,
        by_run={run.name: [row for row in results["changes"] if row["run"] == run.name] for run in runs[1:]},
        curves=panels(
            {run.name: run.rows for run in runs}, [metric for metric in metrics if metric not in IMAGE_STATISTICS]
        ),
        grids={
            name: "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode()
            for name, p in grids.items()
            if p.is_file()
        },
        checker=any(run.config.evaluation and run.config.evaluation.checker for run in runs),
    )
