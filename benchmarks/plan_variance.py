"""Variance of the gradient over draws of the plan: one plan a batch, one a sample, or one a sample stratified over the
batch.

FlowBP-Sparse on the embedded model, with prompts, noise and weights held fixed, so that only the plans differ. The
gradient is then a sum, over samples b and their active nodes i, of weight_i J_{b,i}^T g_b. The sweep computes each of
these terms once. The gradient of any draw is a sum of them, which is checked against the sweep of one draw. Reported
for a gradient G with mean m over the plans:

    gain       Var(G . m) / |m|^4     what a small step along G gains in reward is proportional to G . m
    gradient   E|G - m|^2 / |m|^2     trace of the covariance, over all directions: most are a single sample's own

Reported too is the mean cosine of two samples' gradients. Where it is near 0, the variance of the gradient is the same
whether samples share a plan or not. For each batch size the samples are divided into groups of that size, and the mean
over the groups is reported.

    python benchmarks/plan_variance.py --json docs/plan_variance.json --png docs/plan_variance.png
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.guidance import Guidance
from flowbp.methods import FlowBPSparse, draw_plans
from flowbp.objective import Objective, reward_gradient
from flowbp.plan import PlanBatch
from flowbp.rewards import load_reward
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.surrogate import backward, reward_input
from flowbp.trajectory import rollout

KINDS = ("shared", "per_sample", "stratified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
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
    # Inner products of the samples' whole gradients, each summed over all nodes.
    whole = np.einsum("i,bicj,j->bc", np.diff(sigmas), gram, np.diff(sigmas))
    norms = np.sqrt(np.diag(whole))
    cosine = float((whole / np.outer(norms, norms))[~np.eye(len(terms), dtype=bool)].mean())
    print(f"mean cosine of two samples' gradients {cosine:.4f}", flush=True)
    rows = []
    for batch in (size for size in (1, 2, 4, 8, 16, 32, 64) if size <= arguments.batch):
        for kind in KINDS:
            groups = [
                gram[first:][:batch, :, first:][:, :, :batch] for first in range(0, len(terms) - batch + 1, batch)
            ]
            variances = []
            for products in groups:
                plans = (draw_plans(method, sigmas, rng, batch, kind) for _ in range(arguments.draws))
                draws = np.array([coefficients(plan, batch, arguments.steps).ravel() for plan in plans]) / batch
                variances.append(relative_variances(draws, products.reshape(draws.shape[1], -1)))
            gain, gradient = map(float, np.mean(variances, axis=0))
            rows.append({"batch": batch, "plans": kind, "gain": gain, "gradient": gradient})
            print(
                f"batch {batch:3}  {kind:11} relative variance of the gain {gain:.4f}, of the gradient {gradient:.4f}",
                flush=True,
            )
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        meta = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "commit": commit,
            "draws": arguments.draws,
            "cosine": cosine,
        }
        arguments.json.write_text(
            json.dumps(meta | {"active": arguments.active, "steps": arguments.steps, "rows": rows}, indent=1) + "\n"
        )
    if arguments.png:
        draw(rows, arguments).savefig(arguments.png, dpi=130)


def relative_variances(draws: np.ndarray, products: np.ndarray) -> tuple[float, float]:
    """(gain, gradient) of D gradients, which are sums of B N terms. draws: their coefficients [D, B N].  products: the
    inner products of the terms [B N, B N].
    """
    mean = draws.mean(axis=0)
    deviation = draws - mean
    images = deviation @ products
    variance = (images * deviation).sum() / (len(draws) - 1)
    squared_norm = mean @ products @ mean - variance / len(draws)
    return (images @ mean).var(ddof=1) / squared_norm**2, variance / squared_norm


def sample_gradients(batch: int, steps: int):
    """(terms, sweep, sigmas). terms: J_{b,i}^T g_b for each sample and node [B, N, P].  sweep(plan): the sweep's
    gradient times the batch size [P].
    """
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
    return np.array(terms), sweep, levels


def coefficients(plan, batch: int, steps: int) -> np.ndarray:
    """Gradient weight of each sample's nodes, [B, N]."""
    table = np.zeros((batch, steps))
    for b, own in enumerate(plan.plans if isinstance(plan, PlanBatch) else [plan] * batch):
        for node, weight in own.active:
            table[b, node] = weight
    return table


def draw(rows: list[dict], arguments: argparse.Namespace):
    """A plot of both relative variances over the batch size, with one line for each kind of draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    titles = {"gain": "gain of a step, to first order", "gradient": "gradient, all directions"}
    sizes = sorted({row["batch"] for row in rows})
    for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for kind, color, marker in zip(KINDS, ("#6b7785", "#d97706", "#2563eb"), "os^", strict=True):
            values = [row[measure] for row in rows if row["plans"] == kind]
            axes.plot(sizes, values, marker=marker, color=color, label=kind.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative variance over plans")
    figure.axes[1].legend(frameon=False, title="plans")
    figure.suptitle(
        f"FlowBP-Sparse, {arguments.active} of {arguments.steps} nodes; prompts and noise fixed", fontsize=10
    )
    return figure


if __name__ == "__main__":
    main()
