"""The seven methods, each with the same budget of tuning, then compared over seeds on other prompts.

    python benchmarks/tuned_methods.py tune --json docs/methods/tuning.json
    python benchmarks/tuned_methods.py test --json docs/methods/tuned.json --tuning docs/methods/tuning.json

tune: four trials a method on dev prompts, seed 42: three learning rates with the demo's hinge, and the middle one
without a hinge. (All seven gained from 7e-4 to 1.4e-3; so the lowest rate of the first plan, 3.5e-4, gave way to
2.8e-3 when one method had tried it.) Each method keeps the plan settings of its own defaults. The trial with the
highest checker is chosen, and not that with the highest monitor, a reward that is never trained on: from 1.4e-3 to
2.8e-3 the monitor rises for six methods, and the checker falls for four.

test: each method with its choice, on test prompts, from several seeds, at the demo's optimizer steps, and once more
where it has made as many network calls as the method of the fewest makes in all (`early`). A replay counts as a call,
as it is when nothing is kept from the rollout. Three points of our own stand beside the methods that they vary, with
their choice.

Otherwise the settings and the scores are those of controls.py, so that its rows can be read beside these. A run is kept
in the JSON file when it ends, and is not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from few_steps import METRICS, collect, summary, told, trained

from flowbp.evaluation.statistics import mean_of_runs
from flowbp.methods import METHODS

TRIALS = {
    "7e-4": ["optimizer.lr=7e-4"],
    "1.4e-3": ["optimizer.lr=1.4e-3"],
    "2.8e-3": ["optimizer.lr=2.8e-3"],
    "1.4e-3, no hinge": ["optimizer.lr=1.4e-3", "reward.hinge=null"],
}
REPLAYED = "memory.recompute=always"  # a plan a sample keeps no graphs
# name -> (method, further settings)
POINTS = {method: (method, []) for method in METHODS} | {
    "flowbp-sparse, a plan a sample": ("flowbp-sparse", ["plans=per_sample", REPLAYED]),
    "flowbp-sparse, stratified plans": ("flowbp-sparse", ["plans=stratified", REPLAYED]),
    "flowbp-lagrange, uniform weights": ("flowbp-lagrange", ["method.weights=uniform"]),
}
CHOSEN_BY = "checker"
REFERENCE = "flowbp-lagrange"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tune", "test"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[42, 43, 44, 45, 46], help="of test; none: only sum up")
    parser.add_argument("--points", nargs="+", choices=POINTS, metavar="NAME", help="some alone; tune: of the methods")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tuning", type=Path, help="of test: what tune has written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    if arguments.stage == "tune":
        names = [f"{method}: {trial}" for trial in TRIALS for method in arguments.points or METHODS]
        found = collect(arguments.json, [42] if arguments.seeds else [], names, tune)
        found["chosen"] = {method: choice(method, found["runs"]) for method in METHODS}
        print(trials(found["runs"], found["chosen"]))
    else:
        tuning = json.loads(arguments.tuning.read_text())
        total = min(map(calls_in_all, tuning["runs"]))

        def test(point: str, seed: int, earlier: list[dict]) -> dict:
            method, others = POINTS[point]
            settings = [f"method={{name: {method}}}", *TRIALS[tuning["chosen"][method]], *others]
            return trained(settings, seed, earlier[0]["before"] if earlier else None, early=total)

        found = collect(arguments.json, arguments.seeds, arguments.points or POINTS, test)
        made = [point for point in POINTS if any(run["setting"] == point for run in found["runs"])]
        found["chosen"] = {point: tuning["chosen"][method] for point, (method, _) in POINTS.items()}
        found["rows"] = [summary(point, REFERENCE, found["runs"]) for point in made]
        print(table(found))
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def tune(name: str, seed: int, earlier: list[dict]) -> dict:
    method, trial = name.split(": ")
    settings = [f"method={{name: {method}}}", *TRIALS[trial], "evaluation.prompts=shapes:dev"]
    return trained(settings, seed, earlier[0]["before"] if earlier else None)


def choice(method: str, runs: list[dict]) -> str | None:
    """The trial of a method with the highest score of CHOSEN_BY."""
    own = {run["setting"]: run["after"][CHOSEN_BY] for run in runs}
    tried = [trial for trial in TRIALS if f"{method}: {trial}" in own]
    return max(tried, key=lambda trial: own[f"{method}: {trial}"]) if tried else None


def calls_in_all(run: dict, steps: int = 300) -> float:
    """Network calls of an image position over a whole run."""
    return steps * (run["calls"] + run["replays"])


def trials(runs: list[dict], chosen: dict[str, str | None]) -> str:
    """Markdown: the change of checker / monitor of each trial; those chosen are bold."""
    lines = [f"| | {' | '.join(TRIALS)} |", f"|{'---|' * (1 + len(TRIALS))}"]
    for method in METHODS:
        cells = []
        for trial in TRIALS:
            run = next((run for run in runs if run["setting"] == f"{method}: {trial}"), None)
            changes = run and [run["after"][name] - run["before"][name] for name in (CHOSEN_BY, "monitor")]
            cell = " / ".join(f"{change:+.3f}".replace("0.", ".") for change in changes) if changes else ""
            cells.append(f"**{cell}**" if chosen[method] == trial else cell)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: dict) -> str:
    """Markdown: the changes of each point over its seeds, the checker's at equal calls, and its difference from
    REFERENCE at equal steps.
    """
    head = ["", "trial", "runs", "calls", "CPU s", *METRICS, "checker at equal calls", f"checker less {REFERENCE}'s"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found["rows"]:
        runs = [run for run in found["runs"] if run["setting"] == row["setting"]]
        calls = sum(run["calls"] + run["replays"] for run in runs) / len(runs)
        cells = [row["setting"], found["chosen"][row["setting"]], str(len(runs)), f"{calls:.1f}"]
        cells += [f"{row['seconds']:.2f}".lstrip("0"), *(told(row["change"][metric]) for metric in METRICS)]
        # A run of fewer calls than that in all counts at its end.
        early = [run.get("early", run["after"])["checker"] - run["before"]["checker"] for run in runs]
        cells.append(told(mean_of_runs(early)))
        cells.append(told(row["difference"]["checker"]) if row["difference"] else "")
        lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
