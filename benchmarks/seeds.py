"""Several runs of the same settings as one row: the mean change over training seeds, and its standard deviation.

    for seed in 42 43 44; do flowbp train demo seed=$seed output=runs/demo-$seed; done
    python benchmarks/seeds.py runs/demo-* --json docs/methods/seeds.json

Runs that differ in their seed and output alone share a row; each must have been evaluated. The interval that one run
reports is over its prompts and images. The deviation here is that between training runs, which is larger.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import yaml

METRICS = ("reward", "monitor", "checker", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    runs = sorted(map(read, arguments.runs), key=lambda run: (run["method"], run["seed"]))
    rows = [
        summary(name, [run for run in runs if settings_of(run) == name])
        for name in dict.fromkeys(map(settings_of, runs))
    ]
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows, "runs": runs}, indent=1) + "\n")


def read(folder: Path) -> dict:
    """A run's settings, and how its scores changed."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    overall = {
        row["metric"]: row for row in json.loads((folder / "evaluation.json").read_text()) if row["category"] == "all"
    }
    seed, _ = config.pop("seed"), config.pop("output")
    return {
        "method": config["method"]["name"],
        "seed": seed,
        "seconds": round(sum(step["seconds"] for step in steps), 1),
        "changes": {
            name: {key: overall[name][key] for key in ("before", "after", "change", "low", "high")} for name in METRICS
        },
        "environment": json.loads((folder / "environment.json").read_text()),
        "config": config,
    }


def settings_of(run: dict) -> str:
    return json.dumps(run["config"], sort_keys=True)


def summary(settings: str, runs: list[dict]) -> dict:
    """Mean and standard deviation (n - 1) over seeds of each metric's change; the seeds; median seconds of training."""
    changes = {name: np.array([run["changes"][name]["change"] for run in runs]) for name in METRICS}
    return {
        "method": json.loads(settings)["method"]["name"],
        "seeds": [run["seed"] for run in runs],
        "mean": {name: float(values.mean()) for name, values in changes.items()},
        "deviation": {name: float(values.std(ddof=1)) if len(values) > 1 else None for name, values in changes.items()},
        "before": {name: float(np.mean([run["changes"][name]["before"] for run in runs])) for name in METRICS},
        "after": {name: float(np.mean([run["changes"][name]["after"] for run in runs])) for name in METRICS},
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def table(rows: list[dict]) -> str:
    """Markdown: a row a method, mean ± deviation of each change."""

    def cell(row: dict, name: str) -> str:
        spread = "" if row["deviation"][name] is None else f" ± {row['deviation'][name]:.3f}".replace("0.", ".")
        return f"{row['mean'][name]:+.3f}".replace("0.", ".", 1) + spread

    lines = [f"| method | seeds | {' | '.join(METRICS)} |", f"|{'---|' * (2 + len(METRICS))}"]
    lines += [
        f"| {row['method']} | {len(row['seeds'])} | {' | '.join(cell(row, name) for name in METRICS)} |" for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
