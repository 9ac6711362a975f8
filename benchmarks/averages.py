"""Which decay the moving average of the weights should have. The demo is trained once for each seed, and at the end it
is scored with averages of several decays.

An average does not change the training, so one run serves all decays. Scores are on 576 images of the dev prompts and
given as changes from the base model. The deviation is that between training runs.

    python benchmarks/averages.py --seeds 42 43 44 45 46 --json docs/averages.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from flowbp.config import load
from flowbp.runtime.environment import environment
from flowbp.training.trainer import Trainer

DECAYS = (0.0, 0.9, 0.95, 0.98, 0.99, 0.995)  # 0: the last weights
METRICS = ("reward", "monitor", "checker", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    runs = {seed: train(seed) for seed in arguments.seeds}
    rows = []
    for decay in DECAYS:
        changes = np.array([[run[decay][name] - run["base"][name] for name in METRICS] for run in runs.values()])
        mean, deviation = changes.mean(axis=0), changes.std(axis=0, ddof=1)
        row = {name: [float(m), float(d)] for name, m, d in zip(METRICS, mean, deviation, strict=True)}
        rows.append({"decay": decay} | row)
        print(f"{decay:5}  " + "  ".join(f"{name} {m:+.3f} ± {d:.3f}" for name, (m, d) in row.items()))
    if arguments.json:
        about = {"environment": environment(), "seeds": arguments.seeds, "base": next(iter(runs.values()))["base"]}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def train(seed: int) -> dict:
    """Mean scores of the base model and of every average, by decay, after a run of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        scored = ["evaluation.prompts=shapes:dev", "evaluation.samples=576", "evaluation.seed=77"]
        config = load("demo", [f"output={folder}", f"seed={seed}", "ema=null", *scored])
        trainer = Trainer(config)
    averages = {decay: {name: p.detach().clone() for name, p in trainer.model.parameters.items()} for decay in DECAYS}
    for step in range(config.steps):
        trainer.step(step)
        for decay, average in averages.items():
            for name, p in trainer.model.parameters.items():
                average[name].lerp_(p.detach(), 1 - decay)
    found = {}
    for key, weights in {"base": trainer.model.base, **averages}.items():
        scores = trainer.evaluator.score(trainer.model, weights, trainer.evaluator.samples)
        found[key] = {name: float(np.nanmean(scores.values[name])) for name in METRICS}
    return found


if __name__ == "__main__":
    main()
