"""Variance of the gradient over draws of the plan: one plan a batch, one a sample, or one a sample stratified over the batch.

On the embedded model, with prompts, noise and weights held fixed, so that only the plans differ: the trace of the gradient's covariance,
over the squared norm of its mean. A ratio of 1 to `shared` means nothing is won; 1 / batch is what independent samples would win if every
sample had the same gradient.

    python benchmarks/plan_variance.py --draws 200 --json docs/plan_variance.json --png docs/plan_variance.png
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from flowbp.backbones import bind_velocity, load_backbone
from flowbp.data import load_prompts, sample_seeds
from flowbp.guidance import Guidance
from flowbp.methods import FlowBPBridge, FlowBPLagrange, FlowBPSparse, draw_plans
from flowbp.objective import Objective, loss_factors, reward_gradient, sample_weights
from flowbp.rewards import load_reward
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout

KINDS = ("shared", "per_sample", "stratified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()

    backbone, reward = load_backbone("shapes", max_sequence_length=1), load_reward("clip", "shapes")
    backbone.denoiser.requires_grad_(True)
    parameters = list(backbone.denoiser.parameters())
    texts = [prompt.text for prompt in load_prompts("shapes:train")[: arguments.batch]]
    velocity = bind_velocity(backbone, texts, Guidance())
    sigmas = backbone.sigmas(arguments.steps, 32, 32)
    noise = backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in sample_seeds(0, count=len(texts))])

    def gradient(plan) -> np.ndarray:
        trajectory = rollout(velocity, noise, sigmas, plan)
        weights, keep = torch.ones(len(texts)), torch.ones(len(texts), dtype=torch.bool)
        if plan.similarity is not None:
            weights, keep = sample_weights(plan.similarity, *residuals(plan, trajectory))

        def score(z, part):
            return reward(backbone.decode(z), texts[part])

        _, _, g = reward_gradient(Objective(), score, reward_input(plan, trajectory), loss_factors(weights, keep))
        for p in parameters:
            p.grad = None
        backward(plan, trajectory, velocity.replay, g)
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]).double().numpy()

    rows = []
    for method in (FlowBPSparse(4), FlowBPBridge(4), FlowBPLagrange()):
        for kind in KINDS:
            rng, total, squares = np.random.default_rng(0), 0.0, 0.0
            for _ in range(arguments.draws):
                drawn = gradient(draw_plans(method, sigmas.double().numpy(), rng, len(texts), kind))
                total, squares = total + drawn, squares + drawn @ drawn
            mean = total / arguments.draws
            variance = (squares - arguments.draws * mean @ mean) / (arguments.draws - 1)
            signal = mean @ mean - variance / arguments.draws  # without bias
            rows.append({"method": type(method).__name__, "plans": kind, "relative_variance": variance / signal, "variance": variance})
            print(f"{rows[-1]['method']:16} {kind:11} relative variance {variance / signal:.4f}", flush=True)
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        meta = {"machine": platform.machine(), "torch": torch.__version__, "commit": commit, "draws": arguments.draws}
        arguments.json.write_text(json.dumps(meta | {"batch": arguments.batch, "steps": arguments.steps, "rows": rows}, indent=1) + "\n")
    if arguments.png:
        draw(rows, arguments).savefig(arguments.png, dpi=130)


def draw(rows: list[dict], arguments: argparse.Namespace):
    """Bars of the relative variance, grouped by method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for offset, (kind, color) in enumerate(zip(KINDS, ("#b8c1cc", "#93b4f5", "#2563eb"), strict=True)):
        values = [row["relative_variance"] for row in rows if row["plans"] == kind]
        bars = axes.bar(np.arange(len(methods)) + 0.27 * (offset - 1), values, 0.25, color=color, label=kind)
        axes.bar_label(bars, fmt="%.2g", fontsize=8, padding=2)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_ylabel("variance / squared norm of the mean")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="plans")
    axes.set_title(f"Gradient variance over plans: batch {arguments.batch}, {arguments.draws} draws, noise fixed", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
