"""`flowbp compare`: several finished runs in one table and one page, and what in their configs makes the comparison unfair.

What the runs are compared for is the method: its fields are listed as the point. Any other difference that reaches the weights or the
scores is named: a method that trained on more images, under other guidance, or was scored on other prompts has not been compared.
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

from flowbp import checkpoint, figures
from flowbp.config import dump, flatten, is_one_reward, load
from flowbp.evaluation import Scores, compare, summarise
from flowbp.report import as_data_uri, render, without_nan

__all__ = ["Contrast", "Run", "compare_runs", "contrast", "read_run"]

THE_POINT = ("method",)
BOOKKEEPING = (  # keys that reach neither weights nor scores, up to rounding; of batches, the product counts
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
    "evaluation.every",
)
IMAGES_A_STEP = "data.batch_size x data.accumulate"
REASONS = {
    IMAGES_A_STEP: "another number of images an optimizer step",
    "steps": "another number of optimizer steps",
    "seed": "other prompts, noise and initial weights; compare means over several seeds instead",
    "guidance": "another velocity, and perhaps another gradient",
    "rollout": "another sampler or resolution",
    "backbone": "another model",
    "reward": "another objective",
    "data": "other training prompts",
    "evaluation.best": "another rule for when to stop",
    "evaluation.patience": "another rule for when to stop",
    "evaluation": "scored on other samples or by other metrics",
    "": "another training recipe",
}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. config: nested, with defaults. rows: of metrics.jsonl. before, after: its evaluation, if it made one."""

    name: str
    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    before: Scores | None
    after: Scores | None


def read_run(folder: Path, name: str) -> Run:
    """Raises FileNotFoundError for a folder that holds no run, or one that has not started."""
    for file in ("config.yaml", "metrics.jsonl"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}: pass the folders of runs")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        raise FileNotFoundError(f"{folder}/metrics.jsonl is empty: the run has not taken a step")
    tables = (folder / f"scores_{side}.csv" for side in ("before", "after"))
    scores = (Scores.read_csv(table) if table.is_file() else None for table in tables)
    return Run(name, folder, yaml.safe_load(dump(load(folder / "config.yaml"))), rows, *scores)


# -- configs -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Keys in which configs differ: key -> the value of each run. unfair: also why."""

    point: dict[str, list[Any]]
    unfair: dict[str, tuple[list[Any], str]]
    bookkeeping: dict[str, list[Any]]


def contrast(configs: Sequence[Mapping[str, Any]]) -> Contrast:
    """Sort the differences of nested configs into the point (the method), what is unfair, and what changes no result."""
    flat = [flatten(config) for config in configs]
    for values in flat:
        values[IMAGES_A_STEP] = values.get("data.batch_size", 1) * values.get("data.accumulate", 1)
    found = Contrast({}, {}, {})
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [one.get(key) for one in flat]
        if all(value == values[0] for value in values):
            continue
        if within(key, THE_POINT):
            found.point[key] = values
        elif within(key, BOOKKEEPING) and key != "memory.vae_tiling":  # whose seams are seen by the reward
            found.bookkeeping[key] = values
        else:
            found.unfair[key] = values, next(why for prefix, why in REASONS.items() if within(key, (prefix,)) or not prefix)
    return found


def within(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


# -- the comparison ----------------------------------------------------------------------------------------------------------------


def compare_runs(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare at least two runs, write comparison.json and comparison.html into `out`, and return what the former holds.

    {"runs", "point", "unfair", "bookkeeping", "warnings", "costs", "means", "changes": paired with the first run, where samples agree}
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two runs or more, got {len(folders)}")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    first, found = runs[0], contrast([run.config for run in runs])
    scored = {run.name: run.after for run in runs if run.after is not None}
    paired = [run for run in runs[1:] if same_samples(run, first)]
    base = {"before training": first.before} if first.before is not None else {}
    results = {
        "runs": [{"name": run.name, "folder": str(run.folder), "steps": len(run.rows)} for run in runs],
        "point": found.point,
        "unfair": {key: {"values": values, "why": why} for key, (values, why) in found.unfair.items()},
        "bookkeeping": found.bookkeeping,
        "warnings": run_warnings(runs, paired),
        "costs": {run.name: cost(run.rows) for run in runs},
        "means": [{"run": name} | asdict(row) for name, scores in (base | scored).items() for row in summarise(scores)],
        "changes": [{"run": r.name, "against": first.name} | asdict(row) for r in paired for row in compare(first.after, r.after)],
    }
    results = without_nan(results)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_file(out / "comparison.json", json.dumps(results, indent=1) + "\n")
    checkpoint.replace_file(out / "comparison.html", page(runs, results))
    return results


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many of them as it takes to tell them apart. Raises ValueError for equal folders."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is compared with itself: {', '.join(map(str, folders))}")


def same_samples(run: Run, first: Run) -> bool:
    one, other = run.after, first.after
    return one is not None and other is not None and (one.prompts, one.seeds) == (other.prompts, other.seeds)


def run_warnings(runs: Sequence[Run], paired: Sequence[Run]) -> list[str]:
    """What a reader of the table must know before its numbers."""
    found = [f"{run.name} has taken {len(run.rows)} of {run.config['steps']} steps" for run in runs if len(run.rows) != run.config["steps"]]
    found += [f"{run.name} has no evaluation: score it with flowbp eval" for run in runs if run.after is None]
    found += [
        f"{run.name} was scored on other prompts or seeds than {runs[0].name}: no paired test"
        for run in runs[1:]
        if run.after is not None and run not in paired
    ]
    return found


def cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds a step, and the highest peak memory in MB."""
    return {"seconds a step": float(np.median([row["seconds"] for row in rows])), "peak MB": max(row["peak_mb"] for row in rows)}


def page(runs: Sequence[Run], results: Mapping[str, Any]) -> str:
    metrics = dict.fromkeys(row["metric"] for row in results["means"])
    overall = {metric: {r["run"]: r for r in results["means"] if (r["metric"], r["category"]) == (metric, "all")} for metric in metrics}
    trained = [name for run in runs for name in (["reward"] if is_one_reward(run.config["reward"]) else run.config["reward"])]
    keys = {key: key for key in dict.fromkeys([*trained, *metrics, "grad_norm"]) if any(key in row for run in runs for row in run.rows)}
    grids = {run.name: run.folder / "samples_after.png" for run in runs}
    return render(
        "comparison.html",
        name=" against ".join(run.name for run in runs),
        results=results,
        columns=list(dict.fromkeys(row["run"] for row in results["means"])),
        overall=overall,
        by_run={run.name: [row for row in results["changes"] if row["run"] == run.name] for run in runs[1:]},
        curves=as_data_uri(figures.overlaid_curves({run.name: run.rows for run in runs}, keys)),
        grids={name: "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode() for name, p in grids.items() if p.is_file()},
    )
