"""The share of a whole training step that the ops of flowbp_kernels take.

    python benchmarks/step_share.py [--device cuda] [--json FILE]

One step of FlowBP-Lagrange on a plain transformer: rollout with guidance, reward gradient, residuals, sweep. The ops
are timed inside the step, each call between two clock readings. On a GPU the readings wait for the device, so that a
step with clocks is slower than one without; both times are given. The network is small, so the share is an upper bound:
with a network of billions of parameters it is smaller.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from flowbp import surrogate, trajectory  # noqa: E402
from flowbp.guidance import Guidance, GuidedVelocity  # noqa: E402
from flowbp.methods import FlowBPLagrange  # noqa: E402
from flowbp_kernels import backend, sweep  # noqa: E402
from flowbp_kernels.bench import machine, measure  # noqa: E402

OPS = ("cfg_multistep_step", "cfg_euler_step", "quadrature_update", "leap_residuals", "bridge_cotangents")


class Transformer(nn.Module):
    """v(x, sigma, c) on a latent [B, tokens, 64], the shape into which FLUX.1 packs its latents."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.inner, self.outer, self.level = nn.Linear(64, width), nn.Linear(width, 64), nn.Linear(1, width)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x, sigma, conditioning):
        hidden = self.inner(x) + self.level(sigma.to(x.dtype).reshape(1, 1, 1)) + conditioning["text"][:, None]
        return self.outer(self.blocks(hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a latent (256)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="rollout steps (25)")
    parser.add_argument("--repeats", type=int, default=5, help="training steps timed (5)")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    shares = [
        share(name, options)
        for name, runs, _ in backend.report()
        if runs and (name != "cpu" or options.device == "cpu")
    ]
    for row in shares:
        print(
            f"{row['kernels']:<10} {row['step_ms']:9.1f} ms a step; ops {row['ops_ms']:8.2f} ms: {row['percent']:.2f} "
            f"%  {row['by_op_ms']}"
        )
    if options.json:
        case = {key: value for key, value in vars(options).items() if key != "json"}
        report = {"machine": machine(options.device), "case": case, "shares": shares}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def share(kernels: str, options: argparse.Namespace) -> dict:
    """Milliseconds of a step without clocks (the median), and of the ops inside a step with clocks, together and one by
    one: those of the step whose share is the median.
    """
    with measure.kernels(kernels):
        step = training_step(options)
        step()
        plain = statistics.median(timed(step, options.device) for _ in range(options.repeats))
        clocked = []
        for _ in range(options.repeats):
            with clocks(options.device) as spent:
                whole = timed(step, options.device)
            clocked.append((100 * sum(spent.values()) / whole, spent))
    percent, spent = sorted(clocked, key=lambda one: one[0])[len(clocked) // 2]
    by_op = {op: round(1e3 * seconds, 3) for op, seconds in spent.items()}
    return {
        "kernels": kernels,
        "step_ms": 1e3 * plain,
        "ops_ms": sum(by_op.values()),
        "percent": percent,
        "by_op_ms": by_op,
    }


def training_step(options: argparse.Namespace):
    torch.manual_seed(0)
    network = Transformer(options.width, options.depth).to(options.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    positive, negative = ({"text": torch.randn(options.batch, options.width, device=options.device)} for _ in range(2))
    velocity = GuidedVelocity(network, positive, negative, Guidance(scale=4.5))
    u = 1 - torch.arange(options.steps, dtype=torch.float64) / options.steps
    sigmas = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])
    noise = torch.randn(options.batch, options.tokens, 64, device=options.device)
    plan = FlowBPLagrange().plan(sigmas.numpy(), np.random.default_rng(0))

    def step():
        cached = trajectory.rollout(velocity, noise, sigmas, plan)
        x = surrogate.reward_input(plan, cached).requires_grad_()
        (g,) = torch.autograd.grad(x.square().mean(), x)
        if plan.similarity is not None:
            surrogate.residuals(plan, cached)
        surrogate.backward(plan, cached, velocity.replay, g)
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def clocks(device: str):
    """Yields a dict, to which every op that the engine calls adds its seconds."""
    spent = {}
    modules = (trajectory, surrogate, sweep)
    replaced = [(module, op, getattr(module, op)) for module in modules for op in OPS if hasattr(module, op)]
    for module, op, function in replaced:

        def clocked(*args, op=op, function=function, **kwargs):
            result = []
            spent[op] = spent.get(op, 0.0) + timed(lambda: result.append(function(*args, **kwargs)), device)
            return result[0]

        setattr(module, op, clocked)
    try:
        yield spent
    finally:
        for module, op, function in replaced:
            setattr(module, op, function)


def timed(call, device: str) -> float:
    """Seconds of a call, and of the GPU's work for it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
