"""How long a training step of the demo takes under other settings, beside the first one.

Each variant is a string of overrides. Their steps are interleaved, so that what else the machine does meets all alike.
Reported are the CPU seconds of one thread, the least and the median over rounds, and the median of the ratios of a
round to the first variant, with its quartiles.

    python benchmarks/step_time.py memory.recompute=always memory.recompute=never --json docs/step_time.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flowbp.config import load
from flowbp.runtime.environment import environment
from flowbp.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar='"KEY=VALUE ..."')
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    trainers = [trainer(variant) for variant in arguments.variants]
    seconds = np.empty((arguments.rounds + 1, len(trainers)))
    for step in range(len(seconds)):
        for i, each in enumerate(trainers):
            began = time.process_time()
            each.step(step)
            seconds[step, i] = time.process_time() - began
    rows, seconds = [], seconds[1:]  # the first warms up
    for variant, own in zip(arguments.variants, seconds.T, strict=True):
        low, middle, high = np.quantile(own / seconds[:, 0], (0.25, 0.5, 0.75))
        times = {"least": float(own.min()), "median": float(np.median(own))}
        rows.append({"variant": variant, **times, "ratio": float(middle), "quartiles": [float(low), float(high)]})
        told = "  ".join(f"{name} {value:.3f} s" for name, value in times.items())
        print(f"{variant:60} {told}  ratio {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    if arguments.json:
        about = {"environment": environment(), "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def trainer(variant: str) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(load("demo", [f"output={folder}", "evaluation=null", *variant.split()]))


if __name__ == "__main__":
    main()
