"""How near a rollout of few steps comes to the flow's own end, and what its images are worth: solvers x steps x
guidance, on the embedded model.

No training. The prompts are the dev prompts, with one noise each, on the published noise levels. The error of an image
is |x_N - x| / |x|, with x from 200 steps of adams-2 from the same noise; an image is right if the checker finds in it
what its caption says. Means with 95 % intervals over prompts. A call is one forward pass of an image: a guided step
makes two. The guidance interval, where there is one, is [.3, 1].

    python benchmarks/solvers.py --json docs/solvers.json --png docs/solvers.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.evaluation.figures import ACTIVE, BRIDGE, INK
from flowbp.evaluation.statistics import interval
from flowbp.guidance import Guidance
from flowbp.quadrature import ORDERS
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.runtime.environment import environment
from flowbp.shapes.checker import load_checker
from flowbp.trajectory import rollout

GUIDANCES = {
    "no guidance": Guidance(),
    "scale 3": Guidance(3.0),
    "scale 3 in [.3, 1]": Guidance(3.0, interval=(0.3, 1.0)),
}
STEPS = (6, 8, 10, 12, 16, 25)
REFERENCE = ("adams-2", 200)
LOOKS = {"euler": (INK, "o", "-"), "adams-2": (ACTIVE, "s", "--"), "adams-3": (BRIDGE, "^", ":")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=288)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    texts = [prompt.text for prompt in load_prompts("shapes:dev")[: arguments.prompts]]
    backbone, checker = load_backbone("shapes", max_sequence_length=1), load_checker(texts)
    generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds(0, count=len(texts))]
    noise = backbone.noise(32, 32, generators)

    def sample(guidance: Guidance, solver: str, steps: int) -> tuple[torch.Tensor, int]:
        """(x_N [B, *S], calls of an image)."""
        sigmas = backbone.sigmas(steps, 32, 32)
        velocity = bind_velocity(backbone, texts, guidance)
        calls = sum(2 if guidance.guides(sigma) else 1 for sigma in sigmas[:-1].tolist())
        return rollout(velocity, noise, sigmas, solver=solver).sample, calls

    rows = []
    for name, guidance in GUIDANCES.items():
        ends, _ = sample(guidance, *REFERENCE)
        for solver in ORDERS:
            for steps in STEPS:
                x, calls = sample(guidance, solver, steps)
                errors = ((x - ends).flatten(1).norm(dim=1) / ends.flatten(1).norm(dim=1)).double().numpy()
                right = np.array([float(score) for score in checker(backbone.decode(x), texts)])
                row = {"guidance": name, "solver": solver, "steps": steps, "calls": calls}
                row |= {"error": with_interval(errors, texts), "checker": with_interval(right, texts)}
                rows.append(row)
                numbers = "  ".join(f"{key} {row[key][0]:.3f} [{row[key][1]:.3f}, {row[key][2]:.3f}]" for key in SHOWN)
                print(f"{name:18}  {solver:7}  {steps:2} steps, {calls:2} calls  {numbers}", flush=True)
    if arguments.json:
        about = {"environment": environment(), "prompts": len(texts), "reference": REFERENCE}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if arguments.png:
        draw(rows).savefig(arguments.png, dpi=130)


SHOWN = ("error", "checker")


def with_interval(values: np.ndarray, texts: list[str]) -> list[float]:
    return [float(values.mean()), *interval(values, np.ones(len(values)), texts)]


def draw(rows: list[dict]) -> Figure:
    """Above the errors, below the checker, against calls; a column for each guidance."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(GUIDANCES), sharex="col", sharey="row")
    for column, guidance in enumerate(GUIDANCES):
        for line, key in enumerate(SHOWN):
            axis = axes[line, column]
            for solver, (colour, marker, dashes) in LOOKS.items():
                points = [row for row in rows if row["guidance"] == guidance and row["solver"] == solver]
                calls, (mean, low, high) = [row["calls"] for row in points], np.array([row[key] for row in points]).T
                style = {"color": colour, "marker": marker, "ls": dashes, "ms": 5, "capsize": 2, "lw": 1.4}
                axis.errorbar(calls, mean, yerr=[mean - low, high - mean], label=solver, **style)
            axis.spines[["top", "right"]].set_visible(False)
            if line == 0:
                axis.set_yscale("log")
                axis.set_title(guidance, loc="left", color=INK)
            else:
                axis.set_xlabel("network calls of an image")
    axes[0, 0].set_ylabel("distance from the flow's end")
    axes[1, 0].set_ylabel("share of right images")
    axes[0, 0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
