"""What a smaller strength of the tuned weights keeps and gives up, over training runs.

Reads evaluations of several runs, here those of `flowbp sweep demo seeds=42..49`, and prints a row a strength: the mean
change of every metric from the base model with its 95 % t interval over the runs.

    for seed in 42 43 44 45 46 47 48 49; do
      flowbp eval runs/sweep/as_given/seed-$seed --strength 0.5,0.75,1 --out runs/strengths/$seed
    done
    python benchmarks/strengths.py runs/strengths/* --json docs/strengths.json
"""

import argparse
import json
from pathlib import Path

from few_steps import told

from flowbp.evaluation.statistics import mean_of_runs

METRICS = ("checker", "reward", "monitor", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of evaluations")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [run for folder in arguments.folders for run in read(folder)]
    strengths = sorted({run["strength"] for run in runs})
    rows = [summary(strength, [run for run in runs if run["strength"] == strength]) for strength in strengths]
    arguments.json.write_text(json.dumps({"rows": rows, "runs": runs}, indent=1) + "\n")
    print(table(rows))


def read(folder: Path) -> list[dict]:
    """The changes over all images of each strength that `folder` holds."""
    results = json.loads((folder / "results.json").read_text())
    runs = []
    for about in results["models"][1:]:
        rows = [row for row in results["changes"] if row["model"] == about["name"] and row["category"] == "all"]
        changes = {row["metric"]: row["change"] for row in rows if row["metric"] in METRICS}
        versions = about["versions"] | {"device": about["device"]}
        runs.append({"strength": about.get("strength", 1.0), "sha256": about["sha256"], "changes": changes} | versions)
    return runs


def summary(strength: float, runs: list[dict]) -> dict:
    changes = {metric: mean_of_runs([run["changes"][metric] for run in runs]) for metric in METRICS}
    return {"strength": strength, "runs": len(runs), "change": changes}


def table(rows: list[dict]) -> str:
    lines = [f"| strength | runs | {' | '.join(METRICS)} |", f"|{'---|' * (2 + len(METRICS))}"]
    for row in rows:
        cells = [told(row["change"][metric]) for metric in METRICS]
        lines.append(f"| {row['strength']:g} | {row['runs']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
