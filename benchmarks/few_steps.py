"""What few steps in training cost: the demo trained with fewer calls of the network, and scored alike.

Each setting of the sampler is trained from several seeds, and its images are then drawn with 25 steps of Euler, however
it was trained. Seeds are shared between settings, so that differences are paired: 95 % t intervals over training runs.
A call is one forward pass of an image, rollout and replays together: a guided step makes two. Seconds are those of one
thread's CPU. A run is kept in the JSON file when it ends, and is not made again.

    python benchmarks/few_steps.py --seeds 42 43 44 45 46 --json docs/few_steps.json --png docs/few_steps.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from flowbp.config import load
from flowbp.evaluation.figures import ACTIVE, BRIDGE, INK
from flowbp.evaluation.scores import summarise
from flowbp.evaluation.statistics import mean_of_runs
from flowbp.runtime.environment import environment
from flowbp.training.trainer import Trainer

FAST = ["guidance.interval=[0.3,1]"]
# name -> (guidance, solver, steps, other settings); the first of each guidance is what the others are compared with
SETTINGS = {
    "scale 3: euler 25": (3.0, "euler", 25, []),
    "scale 3: euler 8, [.3, 1]": (3.0, "euler", 8, FAST),
    "scale 3: adams-2 8, [.3, 1]": (3.0, "adams-2", 8, FAST),
    "euler 25": (1.0, "euler", 25, []),
    "euler 12": (1.0, "euler", 12, []),
    "euler 6": (1.0, "euler", 6, []),
    "adams-2 12": (1.0, "adams-2", 12, []),
    "adams-2 6": (1.0, "adams-2", 6, []),
}
COMMON = ["data.batch_size=16", "memory.recompute=never", "evaluation.samples=576", "evaluation.num_steps=25"]
LOOKS = {"euler": (INK, "o"), "adams-2": (ACTIVE, "s"), "adams-3": (BRIDGE, "^")}
METRICS = ("checker", "reward", "monitor", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[42, 43, 44, 45, 46], help="none: only sum up")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    found = collect(arguments.json, arguments.seeds, arguments.settings, train)
    made = [name for name in SETTINGS if any(run["setting"] == name for run in found["runs"])]
    references = {name: next(other for other in SETTINGS if same_base(other, name)) for name in made}
    found["rows"] = [summary(name, references[name], found["runs"]) for name in made]
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))
    if arguments.png:
        draw(found["runs"], found["rows"]).savefig(arguments.png, dpi=130)


def same_base(one: str, other: str) -> bool:
    return SETTINGS[one][0] == SETTINGS[other][0]


def collect(path: Path, seeds: list[int], names: list[str], make: Callable[[str, int, list[dict]], dict]) -> dict:
    """What `path` holds, with a run of each of `names` from each seed. make(name, seed, earlier runs) makes those that
    are missing; each is written when it ends.
    """
    found = {"environment": environment(), "common": COMMON, "runs": []}
    if path.exists():
        found |= json.loads(path.read_text())
    for seed in seeds:
        for name in names:
            if not any(run["seed"] == seed and run["setting"] == name for run in found["runs"]):
                run = {"setting": name, "seed": seed} | make(name, seed, found["runs"])
                found["runs"].append(run)
                print(json.dumps(run), flush=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def train(name: str, seed: int, earlier: list[dict]) -> dict:
    scale, solver, steps, others = SETTINGS[name]
    sampler = [f"guidance.scale={scale}", f"rollout.solver={solver}", f"rollout.num_steps={steps}"]
    base = next((run["before"] for run in earlier if same_base(run["setting"], name)), None)
    return trained([*sampler, *others], seed, base)


def trained(
    settings: list[str], seed: int, base: dict | None, kind: type[Trainer] = Trainer, early: float | None = None
) -> dict:
    """A whole run: mean scores before (`base`, where they are known) and after, calls, kept nodes and CPU seconds a
    step. `early`: the scores are also taken once an image has had so many calls, as if each replay were a call.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = load("demo", [f"output={folder}", f"seed={seed}", *COMMON, *settings])
        trainer = kind(config)
    model, calls, replays, seconds, found = trainer.model, [], 0, 0.0, {}
    handle = model.backbone.denoiser.register_forward_hook(lambda module, given, output: calls.append(len(output[0])))

    def mean_scores(weights: dict) -> dict:
        counted = len(calls)
        scores = trainer.evaluator.score(model, weights)
        del calls[counted:]
        of_captions = [row for row in summarise(scores) if row["metric"] == "checker" and row["category"] != "all"]
        categories = {row["category"]: row["mean"] for row in of_captions}
        return {metric: float(np.nanmean(scores.values[metric])) for metric in METRICS} | {"categories": categories}

    for step in range(config.steps):
        began = time.process_time()
        nodes = trainer.step(step)["nodes"]
        replays += len(nodes) if config.memory.recompute == "never" else 0  # else calls counts them
        seconds += time.process_time() - began
        if early is not None and "early" not in found and sum(calls) / config.data.batch_size + replays >= early:
            found = {"early_step": step + 1, "early": mean_scores(model.tuned)}
    handle.remove()
    scores = {"before": base or mean_scores(model.base), "after": mean_scores(model.tuned)}
    calls_of_an_image = sum(calls) / config.steps / config.data.batch_size
    means = {"calls": calls_of_an_image, "replays": replays / config.steps, "seconds": round(seconds / config.steps, 4)}
    return means | scores | found


def summary(name: str, reference: str, runs: list[dict]) -> dict:
    """Over the seeds of a setting: mean and 95 % interval of each change, and of its difference from the setting
    `reference`, over the seeds that both have.
    """
    own, others = ({run["seed"]: run for run in runs if run["setting"] == setting} for setting in (name, reference))
    first, shared = next(iter(own.values())), [seed for seed in own if seed in others and name != reference]

    def change(run: dict, metric: str) -> float:
        return run["after"][metric] - run["before"][metric]

    def over(seeds: Iterable[int], less: bool = False) -> dict:
        return {
            metric: mean_of_runs([change(own[s], metric) - (change(others[s], metric) if less else 0) for s in seeds])
            for metric in METRICS
            if metric in first["after"]
        }

    return {
        "setting": name,
        "than": reference,
        "seeds": list(own),
        "calls": float(np.mean([run["calls"] for run in own.values()])),
        "seconds": None if first["seconds"] is None else float(np.mean([run["seconds"] for run in own.values()])),
        "before": first["before"],
        "change": over(own),
        "difference": over(shared, less=True) if shared else {},
    }


def table(rows: list[dict]) -> str:
    """Markdown: for each setting the changes, and below the differences from the first of its guidance."""
    lines = [f"| | runs | calls | CPU s | {' | '.join(METRICS)} |", f"|{'---|' * (4 + len(METRICS))}"]
    for row in rows:
        cells = [row["setting"], str(len(row["seeds"])), f"{row['calls']:g}", f"{row['seconds']:.2f}".lstrip("0")]
        lines.append(" | ".join(["", *cells, *(told(row["change"][metric]) for metric in METRICS), ""]).strip())
        if row["difference"]:
            cells = [f"less {row['than']}", "", "", "", *(told(row["difference"][metric]) for metric in METRICS)]
            lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


def told(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]".replace("0.", ".").replace(" [+nan, +nan]", "")


def draw(runs: list[dict], rows: list[dict]) -> Figure:
    """The checker's gain against the calls of an image, for each guidance: a dot a run, means with intervals."""
    scales = list(dict.fromkeys(SETTINGS[row["setting"]][0] for row in rows))
    figure = Figure(figsize=(4.8 * len(scales), 3.6), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axis, scale in zip(panels, scales, strict=True):
        axis.set_title("no guidance" if scale == 1 else f"guidance {scale:g}", loc="left", color=INK)
        for row in (row for row in rows if SETTINGS[row["setting"]][0] == scale):
            solver, steps = SETTINGS[row["setting"]][1:3]
            colour, marker = LOOKS[solver]
            mean, low, high = row["change"]["checker"]
            most = max(row["calls"] for row in rows if SETTINGS[row["setting"]][0] == scale)
            x = row["calls"] + (0.03 * most if solver != "euler" else 0)  # beside Euler's, not upon it
            gains = [r["after"]["checker"] - r["before"]["checker"] for r in runs if r["setting"] == row["setting"]]
            axis.plot([x] * len(gains), gains, ".", color=colour, alpha=0.35)
            axis.errorbar(x, mean, yerr=[[mean - low], [high - mean]], fmt=marker, color=colour, capsize=3)
            place = {"ha": "left"} if solver != "euler" else {"ha": "right"}
            axis.annotate(f" {solver} {steps} ", (x, mean), va="center", color=colour, **place)
        axis.set_xlabel("network calls of an image and step")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.3, y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gain of right images")
    return figure


if __name__ == "__main__":
    main()
