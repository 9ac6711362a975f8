"""How close each method's gradient comes to full backpropagation, on the embedded model.

Prompts, noise and reward are the same for all. Reported are the cosine of one draw of a method with the true gradient
of a whole chain (mean and deviation over draws), and the network calls that a step costs. The chain is that of the
sampler itself, or with --chain one of many steps, which shows what a sampler of few steps costs too.

    python benchmarks/gradient_quality.py --draws 20 --json docs/gradient_quality.json
    python benchmarks/gradient_quality.py --draws 20 --chain adams-2:50 --methods flowbp-sparse flowbp-lagrange \
        --samplers euler:25 euler:12 euler:8 euler:6 adams-2:10 adams-2:8 adams-2:6 --json docs/gradient_samplers.json
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flowbp.backbones import bind_velocity, load_backbone
from flowbp.guidance import Guidance
from flowbp.methods import METHODS, draw_plan
from flowbp.objective import Objective, loss_factors, sample_weights
from flowbp.plan import SurrogatePlan
from flowbp.quadrature import ORDERS, Solver
from flowbp.rewards import load_reward
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.runtime.environment import environment
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout, rollout_with_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samplers", type=sampler, nargs="+", default=[("euler", 12)], metavar="SOLVER:STEPS")
    parser.add_argument("--chain", type=sampler, metavar="SOLVER:STEPS", help="default: the sampler's own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    backbone, reward = load_backbone("shapes", max_sequence_length=1), load_reward("clip", "shapes")
    backbone.denoiser.requires_grad_(True)
    parameters = list(backbone.denoiser.parameters())
    texts = [prompt.text for prompt in load_prompts("shapes:train")[: arguments.batch]]
    velocity = bind_velocity(backbone, texts, Guidance())

    def take_gradient() -> torch.Tensor:
        gradient = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
        for p in parameters:
            p.grad = None
        return gradient

    def noise_of(draw: int) -> torch.Tensor:
        seeds = sample_seeds(0, draw, count=len(texts))
        return backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in seeds])

    @cache
    def of_the_chain(solver: Solver, steps: int, draw: int) -> torch.Tensor:
        end = rollout_with_graph(velocity, noise_of(draw), backbone.sigmas(steps, 32, 32), solver)
        (-reward(backbone.decode(end), texts)).mean().backward()
        return take_gradient()

    def of_the_plan(plan: SurrogatePlan, solver: Solver, sigmas: torch.Tensor, draw: int) -> torch.Tensor:
        noise = noise_of(draw)
        renoise = [torch.randn_like(noise) for _ in range(plan.num_renoised)]
        trajectory = rollout(velocity, noise, sigmas, plan, renoise, solver=solver)
        z = reward_input(plan, trajectory).requires_grad_()
        factors = None
        if plan.similarity is not None:
            factors = loss_factors(*sample_weights(plan.similarity, *residuals(plan, trajectory)))
        loss = Objective().loss(reward(backbone.decode(z), texts * (1 + plan.num_renoised)), factors)
        backward(plan, trajectory, velocity.replay, torch.autograd.grad(loss, z)[0])
        return take_gradient()

    rows = []
    for solver, steps in arguments.samplers:
        sigmas, chain = backbone.sigmas(steps, 32, 32), arguments.chain or (solver, steps)
        for name in arguments.methods:
            method = METHODS[name](last_n=5) if name == "refl" else METHODS[name]()
            rng, cosines, calls = np.random.default_rng(0), [], 0.0
            for draw in range(arguments.draws):
                plan = draw_plan(method, sigmas.double().numpy(), rng, solver)
                surrogate, full = of_the_plan(plan, solver, sigmas, draw), of_the_chain(*chain, draw)
                cosines.append(torch.cosine_similarity(surrogate, full, dim=0).item())
                calls += (plan.num_steps(steps) + len(plan.active) + 2 * plan.num_renoised) / arguments.draws
            row = {"sampler": f"{solver} {steps}", "method": name}
            row |= {"cosine": float(np.mean(cosines)), "cosine_std": float(np.std(cosines)), "network_calls": calls}
            rows.append(row)
            cosine = f"{row['cosine']:+.3f} ± {row['cosine_std']:.3f}"
            print(f"{row['sampler']:10} {name:16} {cosine}   calls {calls:.1f}", flush=True)
    if arguments.json:
        about = {"environment": environment(), "draws": arguments.draws, "batch": arguments.batch}
        arguments.json.write_text(json.dumps(about | {"chain": arguments.chain, "rows": rows}, indent=1) + "\n")


def sampler(text: str) -> tuple[Solver, int]:
    solver, _, steps = text.partition(":")
    if solver not in ORDERS or not steps.isdigit():
        raise argparse.ArgumentTypeError(f"a sampler reads SOLVER:STEPS, as euler:12, not {text!r}")
    return solver, int(steps)  # pyright: ignore[reportReturnType]


if __name__ == "__main__":
    main()
