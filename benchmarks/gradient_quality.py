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
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.guidance import Guidance
from flowbp.methods import METHODS, Method, draw_plan
from flowbp.objective import Objective, loss_factors, sample_weights
from flowbp.plan import SurrogatePlan
from flowbp.quadrature import ORDERS, Solver
from flowbp.rewards import load_reward
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.runtime.environment import environment
from flowbp.runtime.weights import load_weights
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

    probe = Probe(arguments.batch)
    rows = []
    for solver, steps in arguments.samplers:
        sigmas, chain = probe.backbone.sigmas(steps, 32, 32), arguments.chain or (solver, steps)
        for name in arguments.methods:
            method = usual(name)
            rng, cosines, calls = np.random.default_rng(0), [], 0.0
            for draw in range(arguments.draws):
                plan = draw_plan(method, sigmas.double().numpy(), rng, solver)
                surrogate, full = probe.of_the_plan(plan, sigmas, draw, solver), probe.of_the_chain(*chain, draw)
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


class Probe:
    """The embedded model, its reward, and a batch of training prompts. A gradient is one vector of all weights.

    tuned: a run or LoRA file whose weights are added to the model's.
    """

    def __init__(self, batch: int, tuned: Path | None = None):
        self.backbone, self.reward = load_backbone("shapes", max_sequence_length=1), load_reward("clip", "shapes")
        if tuned is not None:
            load_weights(self.backbone, tuned)
            self.backbone.denoiser.fuse_lora()
            self.backbone.denoiser.unload_lora()
        self.backbone.denoiser.requires_grad_(True)
        self.parameters = list(self.backbone.denoiser.parameters())
        self.texts = [prompt.text for prompt in load_prompts("shapes:train")[:batch]]
        self.velocity = bind_velocity(self.backbone, self.texts, Guidance())
        self.of_the_chain = cache(self._of_the_chain)

    def take_gradient(self) -> torch.Tensor:
        taken = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return taken

    def noise(self, draw: int) -> torch.Tensor:
        seeds = sample_seeds(0, draw, count=len(self.texts))
        return self.backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in seeds])

    def loss(self, sample: torch.Tensor) -> torch.Tensor:
        return (-self.reward(self.backbone.decode(sample), self.texts)).mean()

    def _of_the_chain(self, solver: Solver, steps: int, draw: int) -> torch.Tensor:
        """The gradient through a whole rollout."""
        sigmas = self.backbone.sigmas(steps, 32, 32)
        self.loss(rollout_with_graph(self.velocity, self.noise(draw), sigmas, solver)).backward()
        return self.take_gradient()

    def of_the_plan(
        self,
        plan: SurrogatePlan,
        sigmas: torch.Tensor,
        draw: int,
        solver: Solver = "euler",
        replay: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The gradient of a plan; replay: the velocity that the sweep calls."""
        noise = self.noise(draw)
        renoise = [torch.randn_like(noise) for _ in range(plan.num_renoised)]
        trajectory = rollout(self.velocity, noise, sigmas, plan, renoise, solver=solver)
        z = reward_input(plan, trajectory).requires_grad_()
        factors = None
        if plan.similarity is not None:
            factors = loss_factors(*sample_weights(plan.similarity, *residuals(plan, trajectory)))
        scores = self.reward(self.backbone.decode(z), self.texts * (1 + plan.num_renoised))
        (g,) = torch.autograd.grad(Objective().loss(scores, factors), z)
        backward(plan, trajectory, replay or self.velocity.replay, g)
        return self.take_gradient()


def usual(name: str) -> Method:
    """The method with its defaults; ReFL with as many last nodes as suit 12 steps."""
    return METHODS[name](last_n=5) if name == "refl" else METHODS[name]()


def sampler(text: str) -> tuple[Solver, int]:
    solver, _, steps = text.partition(":")
    if solver not in ORDERS or not steps.isdigit():
        raise argparse.ArgumentTypeError(f"a sampler reads SOLVER:STEPS, as euler:12, not {text!r}")
    return solver, int(steps)  # pyright: ignore[reportReturnType]


if __name__ == "__main__":
    main()
