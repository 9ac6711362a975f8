"""How close each method's gradient comes to full backpropagation, on the embedded model.

Prompts, noise and reward are the same for all. Reported are the cosine of one draw of a method with the true gradient
of the whole Euler chain (mean and deviation over draws), and the network calls that a step costs.

    python benchmarks/gradient_quality.py --draws 20 --json docs/gradient_quality.json
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
from flowbp.guidance import Guidance
from flowbp.methods import METHODS
from flowbp.objective import Objective, loss_factors, sample_weights
from flowbp.rewards import load_reward
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout, rollout_with_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    backbone, reward = load_backbone("shapes", max_sequence_length=1), load_reward("clip", "shapes")
    backbone.denoiser.requires_grad_(True)
    parameters = list(backbone.denoiser.parameters())
    texts = [prompt.text for prompt in load_prompts("shapes:train")[: arguments.batch]]
    velocity = bind_velocity(backbone, texts, Guidance())
    sigmas = backbone.sigmas(arguments.steps, 32, 32)

    def take_gradient() -> torch.Tensor:
        gradient = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
        for p in parameters:
            p.grad = None
        return gradient

    def noise_of(draw: int) -> torch.Tensor:
        seeds = sample_seeds(0, draw, count=len(texts))
        return backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in seeds])

    rows = []
    for name, make in METHODS.items():
        method = make(last_n=5) if name == "refl" else make()
        rng, cosines, calls = np.random.default_rng(0), [], 0.0
        for draw in range(arguments.draws):
            noise = noise_of(draw)
            plan = method.plan(sigmas.double().numpy(), rng)
            renoise = [torch.randn_like(noise) for _ in range(plan.num_renoised)]
            trajectory = rollout(velocity, noise, sigmas, plan, renoise)
            z = reward_input(plan, trajectory).requires_grad_()
            factors = None
            if plan.similarity is not None:
                factors = loss_factors(*sample_weights(plan.similarity, *residuals(plan, trajectory)))
            loss = Objective().loss(reward(backbone.decode(z), texts * (1 + plan.num_renoised)), factors)
            backward(plan, trajectory, velocity.replay, torch.autograd.grad(loss, z)[0])
            surrogate = take_gradient()
            (-reward(backbone.decode(rollout_with_graph(velocity, noise, sigmas)), texts)).mean().backward()
            full = take_gradient()
            cosines.append(torch.cosine_similarity(surrogate, full, dim=0).item())
            calls += (plan.num_steps(arguments.steps) + len(plan.active) + 2 * plan.num_renoised) / arguments.draws
        row = {
            "method": name,
            "cosine": float(np.mean(cosines)),
            "cosine_std": float(np.std(cosines)),
            "network_calls": calls,
        }
        rows.append(row)
        print(f"{name:16} {row['cosine']:+.3f} ± {row['cosine_std']:.3f}   calls {calls:.1f}", flush=True)
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        meta = {"machine": platform.machine(), "torch": torch.__version__, "commit": commit, "draws": arguments.draws}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps(meta | {"batch": arguments.batch, "steps": arguments.steps, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
