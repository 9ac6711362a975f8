"""`flowbp compare`: several finished runs in one table and one page, and what in their configs makes the comparison
unfair.

Runs are compared for their methods, so the fields of the method are listed as the point of the comparison. Any other
difference that reaches the weights or the scores is named as unfair: a method that trained on more images, under other
guidance, or was scored on other prompts has not been compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowbp.config import ConfigError, RunConfig, dump, flatten, load
from flowbp.config.schema import RewardConfig, by_name
from flowbp.evaluation import pages
from flowbp.evaluation.scores import Scores, means_and_changes
from flowbp.evaluation.templates import words
from flowbp.given import inside, read_data
from flowbp.runtime.checkpoint import latest_checkpoint
from flowbp.runtime.environment import ENVIRONMENT, describe_environment
from flowbp.runtime.files import as_json, read_json, write_file
from flowbp.runtime.run_folder import CONFIG, METRICS, RunFolder, check_run, mark_folder, short_names

POINT, UNFAIR, BOOKKEEPING = "point", "unfair", "bookkeeping"  # verdicts on a difference
VERDICTS: dict[str, str] = read_data(__file__, "verdicts.yaml")
EVALUATED, IMAGES_A_STEP = "final evaluation", "images a step"  # added to configs
STOPPING = ("best", "patience", "every", "validation_prompts", "validation_samples")  # of `evaluation`


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. rows: of metrics.jsonl. before, after: the scores of its final evaluation, if it made
    one. environment: the versions and the device that made it.
    """

    name: str
    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    before: Scores | None
    after: Scores | None
    environment: dict[str, Any]

    @property
    def made_with(self) -> str:
        return describe_environment(self.environment) or "not recorded"


def read_run(folder: Path, name: str) -> Run:
    """Raises FileNotFoundError for a folder that holds no run, or a run that has not started, ConfigError for a run
    of another version, and OSError for damaged files.
    """
    check_run(folder)
    try:
        config = load(folder / CONFIG, run_code=False)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG} is not of this version of flowbp: {error}") from None
    run = RunFolder(folder)
    run.check_config()
    if checkpoint := latest_checkpoint(folder):
        run.check_record(checkpoint)
    if not (rows := run.metrics()):
        raise FileNotFoundError(f"{folder / METRICS} is empty: the run has not taken a step")
    if not all(isinstance(row.get(key), int | float) for row in rows for key in ("seconds", "peak_mb")):
        raise OSError(f"{folder / METRICS} is damaged: a row's seconds or peak_mb is no number")
    tables = (inside(folder, f"scores_{side}.csv") for side in ("before", "after"))
    scores = (Scores.read_csv(table) if table.is_file() else None for table in tables)
    recorded = inside(folder, ENVIRONMENT)
    return Run(name, folder, config, rows, *scores, read_json(recorded) if recorded.is_file() else {})


# -- configs -----------------------------------------------------------------------------------------------------------


def contrast(configs: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Sort the differences of nested configs by verdict: {verdict: {key: the value of each run}}.

    For unfair ones, the values come with a reason: {key: {"values": ..., "why": ...}}. images: those of an optimizer
    step, of each run.
    """
    configs = [dict(config) for config in configs]
    # Rewards of other names, and methods of another kind, are compared as a whole: their fields have nothing in common.
    if len({tuple(by_name(config["reward"])) for config in configs}) > 1:
        for config in configs:
            config["reward"] = objective(config["reward"])
    if len({config["method"]["name"] for config in configs}) > 1:
        for config in configs:
            name, fields = config["method"]["name"], {k: v for k, v in config["method"].items() if k != "name"}
            config["method"] = pages.with_fields(name, fields)
    configs = with_evaluation(configs)
    flat = [flatten(config) | {IMAGES_A_STEP: count} for config, count in zip(configs, images, strict=True)]
    can_stop_early = any(values.get("evaluation.patience") is not None for values in flat)
    verdicts = VERDICTS | {f"evaluation.{key}": BOOKKEEPING for key in STOPPING if not can_stop_early}
    sorted_out: dict[str, dict[str, Any]] = {POINT: {}, UNFAIR: {}, BOOKKEEPING: {}}
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [one.get(key) for one in flat]
        if any(value != values[0] for value in values):
            said = verdicts[max((name for name in verdicts if within(key, name)), key=len)]
            if said in sorted_out:
                sorted_out[said][key] = values
            else:
                sorted_out[UNFAIR][key] = {"values": values, "why": said}
    return sorted_out


def within(key: str, prefix: str) -> bool:
    """Whether `key` is `prefix` or of the section `prefix`; "" has all."""
    return not prefix or f"{key}.".startswith(f"{prefix}.")


def with_evaluation(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The configs with one more key, which says whether they have an evaluation.

    Configs without one get the evaluation settings of the first config that has one, except for its early stop. So they
    differ in the new key alone.
    """
    settings = next((config["evaluation"] for config in configs if config["evaluation"] is not None), None)
    none = {EVALUATED: "none", "evaluation": settings and settings | {"patience": None}}
    return [dict(config) | (none if config["evaluation"] is None else {EVALUATED: "made"}) for config in configs]


def objective(rewards: Mapping[str, Any]) -> str:
    """The loss in words: "one reward: clip (hinge 0.8)", "2 rewards: clip + pickscore (weight 0.5)"."""
    terms = [pages.describe_reward(RewardConfig(**spec)) for spec in by_name(rewards).values()]
    return f"{'one reward' if len(terms) == 1 else f'{len(terms)} rewards'}: {' + '.join(terms)}"


# -- the comparison ----------------------------------------------------------------------------------------------------


def compare_runs(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare at least two runs, write comparison.json and comparison.html into `out`, and return what the former
    holds:

    {"runs": what each is and what it took, "point", "unfair", "bookkeeping", "warnings", "means",
    "changes": paired with the first run, where samples agree}
    """
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    mark_folder(out, "flowbp compare")
    first, *others = runs
    scores = {f"{first.name} before training": first.before} | {run.name: run.after for run in runs}
    scored = {name: own for name, own in scores.items() if own is not None}
    both = [run for run in others if run.after is not None and first.after is not None]
    paired = [run.name for run in both if first.after.same_samples(run.after)]
    told = [about(run) for run in runs]
    results = {
        "runs": told,
        **contrast([yaml.safe_load(dump(run.config)) for run in runs], [row["images"] for row in told]),
        "warnings": words("of_runs", runs=runs, paired=paired),
        **means_and_changes("run", scored, first.name, paired),
    }
    write_file(out / "comparison.json", as_json(results))
    others = [run.name for run in others]
    grids = {run.name: inside(run.folder, "samples_after.png") for run in runs}
    page = pages.render(
        "comparison.html",
        name=f"{first.name} against {' and '.join(others) if len(others) < 3 else f'{len(others)} runs'}",
        config=first.config,
        rows=first.rows,
        logged={run.name: run.rows for run in runs},
        environments={run.name: run.made_with for run in runs},
        trained=[name for run in runs for name in run.config.reward],
        shares=[f"{name}_share" for run in runs for name in run.config.reward],
        results=results,
        images={name: pages.as_data_uri(pages.read_png(png)) for name, png in grids.items() if png.is_file()},
    )
    write_file(out / "comparison.html", page)
    return results


def about(run: Run) -> dict[str, Any]:
    """What a run is and what it took: median seconds a step, and the highest peak memory in MB."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "method": run.config.method_name,
        "steps": len(run.rows),
        "seed": run.config.seed,
        "environment": run.environment,
        "seconds_a_step": float(np.median([row["seconds"] for row in run.rows])),
        "peak_mb": max(row["peak_mb"] for row in run.rows),
        "images": pages.images_a_step(run.config, run.rows),
    }
