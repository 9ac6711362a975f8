"""What each method leaves out of the true gradient, and why: bias and variance, node by node, on the embedded model.

The true gradient G is that of the whole Euler chain, a sum over nodes G_n = h_n (dv_n/dtheta)^T c_{n+1}. The cotangent
c_n = c_{n+1} + h_n (dv_n/dx)^T c_{n+1} is the reward's gradient, pulled back to x_n. Prompts and noise are held, so
that only the plan of a method's gradient g is random; E is the mean over plans. Figures are means over batches of
noise.

    methods   cosine of E g with G (bias), |E g| / |G|, and E |g - E g|^2 / |E g|^2 (variance of one draw)
    nodes     E g_n . G_n / |G_n|^2, the share of a node's true gradient that the method has: 1 all of it, 0 none
    chain     |c_n| / |c_N| at each noise level: the chained Jacobians along the reward's gradient
    leaps     mean |x_j' - x_j| / mean |x_j - x_k| of a leap from x_k to x_j, by its length in steps, for the Lagrange
              rule of 1 to 4 nodes; 1 node is LeapAlign's leap

    flowbp train demo output=runs/demo
    python benchmarks/fidelity.py --tuned runs/demo --json docs/fidelity.json --figures docs
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from gradient_quality import Probe, usual

from flowbp.backbones.base import bind_velocity
from flowbp.guidance import Guidance
from flowbp.methods import METHODS, draw_plan
from flowbp.quadrature import euler, lagrange, lagrange_supports
from flowbp.runtime.environment import environment
from flowbp_kernels.sweep import record

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHAINS = [(12, 1.0), (25, 1.0), (50, 1.0), (25, 3.0)]  # steps and guidance
ORDERS = (1, 2, 3, 4)  # nodes of a leap
COLOURS = plt.get_cmap("tab10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, required=True, help="a run of the demo, for the figures after tuning")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draws", type=int, default=32, help="plans of each method for one batch of noise")
    parser.add_argument("--noises", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of re-noised copies

    sizes = {name: getattr(arguments, name) for name in ("steps", "batch", "draws", "noises")}
    found = {"environment": environment(), **sizes}
    for state, weights in {"before": None, "after": arguments.tuned}.items():
        probe = Probe(arguments.batch, weights)
        found[state] = of_methods(probe, arguments) | {"chain": of_chains(probe, arguments.noises)}
        found[state]["leaps"] = of_leaps(probe, 25, arguments.noises)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if arguments.figures:
        draw(found, arguments.figures)


# -- what is measured --------------------------------------------------------------------------------------------------


def of_methods(probe: Probe, options: argparse.Namespace) -> dict:
    """Bias and variance of each method, in total and by node."""
    sigmas, sums = probe.backbone.sigmas(options.steps, 32, 32), defaultdict(list)
    shares = {name: [] for name in METHODS}
    for noise in range(options.noises):
        true = np.stack([node.numpy() for node in chain(probe, sigmas, noise)[0]])
        total = true.sum(axis=0)
        for name in METHODS:
            rng, squares, nodes = np.random.default_rng(noise), 0.0, np.zeros_like(true)
            for _ in range(options.draws):
                drawn = by_node(probe, draw_plan(usual(name), sigmas.double().numpy(), rng), sigmas, noise)
                squares += np.square(drawn.sum(axis=0)).sum() / options.draws
                nodes += drawn / options.draws
            mean = nodes.sum(axis=0)
            # Of a mean over draws, |.|^2 is too large by a draw's variance over their number.
            variance = (squares - np.square(mean).sum()) * options.draws / (options.draws - 1)
            size = max(np.square(mean).sum() - variance / options.draws, 0.0)
            sums[name].append(
                {
                    "cosine": mean @ total / np.sqrt(size * np.square(total).sum()),
                    "norm": np.sqrt(size / np.square(total).sum()),
                    "variance": variance / size,
                }
            )
            shares[name].append(np.einsum("np,np->n", nodes, true) / np.square(true).sum(axis=1))
    methods = {name: means(rows) for name, rows in sums.items()}
    return {"methods": methods, "nodes": {name: np.mean(rows, axis=0).tolist() for name, rows in shares.items()}}


def chain(probe: Probe, sigmas: torch.Tensor, noise: int, guidance: float = 1.0) -> tuple[list[torch.Tensor], list]:
    """([G_n of each node], [|c_n| of each latent, a mean over samples, from the noise to the sample])."""
    velocity = bind_velocity(probe.backbone, probe.texts, Guidance(guidance))
    steps, x = euler(sigmas.double().numpy(), range(len(sigmas) - 1)).tolist(), probe.noise(noise)
    latents = []
    with torch.no_grad():
        for sigma, step in zip(sigmas, steps, strict=False):
            latents.append(x)
            x = x + step * velocity(x, sigma)
    x = x.requires_grad_()
    (c,) = torch.autograd.grad(probe.loss(x), x)
    gradients, norms = [], [c.flatten(1).norm(dim=1).mean().item()]
    for latent, sigma, step in reversed(list(zip(latents, sigmas, steps, strict=False))):
        graph = record(velocity, latent, sigma, requires_grad=True)
        graph.v.backward(step * c)
        c = c + graph.x.grad
        gradients.append(probe.take_gradient())
        norms.append(c.flatten(1).norm(dim=1).mean().item())
    return gradients[::-1], norms[::-1]


def by_node(probe: Probe, plan, sigmas: torch.Tensor, noise: int) -> np.ndarray:
    """[N, P] the gradient of a plan, each node's part by itself. Re-noised copies count as the last node."""
    parts = np.zeros((len(sigmas) - 1, sum(p.numel() for p in probe.parameters)), dtype=np.float32)
    levels, last = sigmas.tolist(), []

    def replay(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        take()
        last.append(levels.index(float(sigma)))
        return probe.velocity.replay(x, sigma)

    def take() -> None:
        gradient = probe.take_gradient()
        if last:
            parts[last.pop()] += gradient.numpy()

    rest = probe.of_the_plan(plan, sigmas, noise, replay=replay)
    parts[last.pop()] += rest.numpy()
    return parts


def of_chains(probe: Probe, noises: int) -> list[dict]:
    rows = []
    for steps, guidance in CHAINS:
        sigmas = probe.backbone.sigmas(steps, 32, 32)
        norms = np.mean([chain(probe, sigmas, noise, guidance)[1] for noise in range(noises)], axis=0)
        rows.append({"steps": steps, "guidance": guidance, "sigmas": sigmas.tolist(), "norms": norms.tolist()})
    return rows


@torch.no_grad()
def of_leaps(probe: Probe, steps: int, noises: int) -> dict:
    """{order: residual by length}, over all starts of a leap."""
    sigmas = probe.backbone.sigmas(steps, 32, 32)
    levels = sigmas.double().numpy()
    found = {order: np.zeros(steps) for order in ORDERS}
    for noise in range(noises):
        x, latents, velocities = probe.noise(noise), [], []
        for i, step in enumerate(euler(levels, range(steps)).tolist()):
            latents.append(x)
            velocities.append(probe.velocity(x, sigmas[i]))
            x = x + step * velocities[-1]
        latents.append(x)
        for length in range(1, steps + 1):
            for start in range(steps + 1 - length):
                stop = start + length
                moved = (latents[stop] - latents[start]).abs().mean()
                for order in ORDERS:
                    nodes = lagrange_supports(start, stop, order)
                    weights = lagrange(levels, nodes, start, stop).tolist()
                    leapt = latents[start] + sum(w * velocities[n] for w, n in zip(weights, nodes, strict=True))
                    residual = (leapt - latents[stop]).abs().mean() / moved
                    found[order][length - 1] += residual.item() / (steps + 1 - length) / noises
    return {order: values.tolist() for order, values in found.items()}


def means(rows: list[dict]) -> dict:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(found: dict) -> str:
    """Markdown: a row a method, before and after tuning."""
    columns = [(key, state) for state in ("before", "after") for key in ("cosine", "norm", "variance")]
    heads = {"cosine": "cosine of the mean", "norm": "its norm", "variance": "variance of a draw"}
    lines = [f"| | {' | '.join(f'{heads[key]}, {state}' for key, state in columns)} |", f"|{'---|' * 7}"]
    for name in METHODS:
        cells = [f"{found[state]['methods'][name][key]:.2f}" for key, state in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict, folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, state in zip(axes, ("before", "after"), strict=True):
        for i, (name, shares) in enumerate(found[state]["nodes"].items()):
            axis.plot(range(len(shares)), shares, "o-", ms=3, lw=1.2, color=COLOURS(i), label=name)
        axis.axhline(1, color="0.6", lw=0.8, ls="--")
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(xlabel="node, from the noise to the sample", title=f"{state} tuning")
    axes[0].set_ylabel("share of the node's true gradient")
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "fidelity_nodes.png", dpi=110)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, row in enumerate(found["before"]["chain"]):
        label = f"{row['steps']} steps, guidance {row['guidance']:g}"
        for state, style in (("before", "-"), ("after", "--")):
            norms = np.array(found[state]["chain"][i]["norms"])
            said = label if state == "before" else None
            axes[0].plot(row["sigmas"], norms / norms[-1], style, lw=1.3, color=COLOURS(i), label=said)
    axes[0].set(yscale="log", xlabel="noise level", ylabel="|c| / |c at the sample|", title="chained Jacobians")
    axes[0].legend(fontsize=8, frameon=False, title="solid: before tuning, dashed: after", title_fontsize=8)
    for i, order in enumerate(ORDERS):
        for state, style in (("before", "-"), ("after", "--")):
            values = {int(key): value for key, value in found[state]["leaps"].items()}[order]
            said = f"{order} node{'s' * (order > 1)}" if state == "before" else None
            axes[1].plot(range(1, len(values) + 1), values, style, lw=1.3, color=COLOURS(i), label=said)
    axes[1].set(xlabel="length of the leap, in steps of 25", ylabel="residual / way", title="residual of a leap")
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "fidelity_chain.png", dpi=110)


if __name__ == "__main__":
    main()
