"""Variance of the gradient over draws of the plan: one plan a batch, one a sample, or one a sample stratified over the batch.

FlowBP-Sparse on the embedded model, with prompts, noise and weights held fixed, so that only the plans differ. There the gradient is a
sum, over samples b and their active nodes i, of weight_i J_{b,i}^T g_b; the sweep gives each of these terms once, and the gradient of any
draw is a sum of them, checked against the sweep of one draw. Reported: the trace of the gradient's covariance over the squared norm of its
mean, and the mean cosine of two samples' gradients. Where that is near 0, it makes no difference whether samples share a plan.

    python benchmarks/plan_variance.py --draws 2000 --json docs/plan_variance.json --png docs/plan_variance.png
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
from flowbp.methods import FlowBPSparse, draw_plans
from flowbp.objective import Objective, reward_gradient
from flowbp.plan import PlanBatch
from flowbp.rewards import load_reward
from flowbp.surrogate import backward, reward_input
from flowbp.trajectory import rollout

KINDS = ("shared", "per_sample", "stratified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()

    terms, sweep, sigmas = sample_gradients(arguments.batch, arguments.steps)  # [B, N, P] for unit weights
    method, rng = FlowBPSparse(arguments.active), np.random.default_rng(0)
    check = draw_plans(method, sigmas, rng, arguments.batch, "per_sample")
    summed = np.einsum("bn,bnp->p", coefficients(check, arguments.batch, arguments.steps), terms)
    assert np.linalg.norm(summed - sweep(check)) <= 1e-4 * np.linalg.norm(summed)  # float32

    flat = terms.reshape(len(terms) * arguments.steps, -1)
    gram = (flat @ flat.T).reshape(len(terms), arguments.steps, len(terms), arguments.steps)
    whole = np.einsum("i,bicj,j->bc", np.diff(sigmas), gram, np.diff(sigmas))  # products of the samples' dense gradients
    norms = np.sqrt(np.diag(whole))
    cosine = float((whole / np.outer(norms, norms))[~np.eye(len(terms), dtype=bool)].mean())
    print(f"mean cosine of two samples' gradients {cosine:.4f}", flush=True)
    rows, batches = [], [size for size in (1, 2, 4, 8, 16, 32) if size <= arguments.batch]
    for batch in batches:
        g = gram[:batch, :, :batch].reshape(batch * arguments.steps, -1)
        for kind in KINDS:
            draws = [coefficients(draw_plans(method, sigmas, rng, batch, kind), batch, arguments.steps) for _ in range(arguments.draws)]
            draws = np.array(draws).reshape(arguments.draws, -1) / batch
            mean = draws.mean(axis=0)
            variance = np.einsum("di,ij,dj->d", draws - mean, g, draws - mean, optimize=True).sum() / (arguments.draws - 1)
            relative = variance / (mean @ g @ mean - variance / arguments.draws)
            rows.append({"batch": batch, "plans": kind, "relative_variance": float(relative)})
            print(f"batch {batch:3}  {kind:11} relative variance {relative:.5f}", flush=True)
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        meta = {"machine": platform.machine(), "torch": torch.__version__, "commit": commit, "draws": arguments.draws, "cosine": cosine}
        arguments.json.write_text(json.dumps(meta | {"active": arguments.active, "steps": arguments.steps, "rows": rows}, indent=1) + "\n")
    if arguments.png:
        draw(rows, arguments).savefig(arguments.png, dpi=130)


def sample_gradients(batch: int, steps: int):
    """(J_{b,i}^T g_b for each sample and node [B, N, P], the sweep's gradient of a plan times the batch [P], sigmas)."""
    backbone, reward = load_backbone("shapes", max_sequence_length=1), load_reward("clip", "shapes")
    blocks = backbone.denoiser.transformer_blocks.requires_grad_(True)
    parameters = [p for p in blocks[1].parameters()]  # one block of four stands for all
    texts = [prompt.text for prompt in load_prompts("shapes:train")[:batch]]
    sigmas = backbone.sigmas(steps, 32, 32)
    noise = backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in sample_seeds(0, count=batch)])

    def sweep(plan, rows=slice(None)) -> np.ndarray:
        velocity = bind_velocity(backbone, texts[rows], Guidance())
        trajectory = rollout(velocity, noise[rows], sigmas, plan)

        def score(z, part):
            return reward(backbone.decode(z), texts[rows][part])

        _, _, g = reward_gradient(Objective(), score, reward_input(plan, trajectory), torch.ones(len(texts[rows])))
        backbone.denoiser.zero_grad(set_to_none=True)
        backward(plan, trajectory, velocity.replay, g)
        return torch.cat([p.grad.flatten() for p in parameters]).numpy().copy()

    levels = sigmas.double().numpy()
    single = [FlowBPSparse(1, rescale=0.0).at(levels, [i]) for i in range(steps)]
    steps_taken = np.diff(levels)
    terms = [[sweep(plan, slice(b, b + 1)) / steps_taken[i] for i, plan in enumerate(single)] for b in range(batch)]
    return np.array(terms, dtype=np.float64), sweep, levels


def coefficients(plan, batch: int, steps: int) -> np.ndarray:
    """Gradient weight of each sample's nodes, [B, N]."""
    table = np.zeros((batch, steps))
    for b, own in enumerate(plan.plans if isinstance(plan, PlanBatch) else [plan] * batch):
        for node, weight in own.active:
            table[b, node] = weight
    return table


def draw(rows: list[dict], arguments: argparse.Namespace):
    """Relative variance over the batch size, a line a kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, color in zip(KINDS, ("#6b7785", "#d97706", "#2563eb"), strict=True):
        points = [(row["batch"], row["relative_variance"]) for row in rows if row["plans"] == kind]
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks([row["batch"] for row in rows[:: len(KINDS)]], [str(row["batch"]) for row in rows[:: len(KINDS)]])
    axes.set_xlabel("batch size")
    axes.set_ylabel("variance / squared norm of the mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="plans")
    axes.set_title(f"Gradient variance over plans: FlowBP-Sparse, {arguments.active} of {arguments.steps} nodes, noise fixed", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
