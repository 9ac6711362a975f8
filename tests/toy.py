"""A small nonlinear velocity field in float64, for tests of the engine."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.surrogate import reward_input
from flowbp.trajectory import rollout
from flowbp_kernels import selective_recompute


class ToyField(nn.Module):
    """v(x, sigma, c): [B, D] -> [B, D], two layers of tanh with dropout; counts its calls, rows, and the rows that
    recorded a graph.
    """

    def __init__(self, size=6, hidden=9, dropout=0.0, checkpointing=False):
        super().__init__()
        self.dropout, self.checkpointing = dropout, checkpointing
        generator = torch.Generator().manual_seed(0)

        def matrix(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.inner, self.level, self.text, self.outer = (
            matrix(hidden, size),
            matrix(hidden),
            matrix(hidden, size),
            matrix(size, hidden),
        )
        self.calls, self.rows, self.rows_with_graph = 0, 0, 0

    def forward(self, x, sigma, conditioning):
        self.calls += 1
        self.rows += len(x)
        self.rows_with_graph += len(x) * torch.is_grad_enabled()
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers, x, sigma, conditioning["text"], use_reentrant=False)
        return self.layers(x, sigma, conditioning["text"])

    def layers(self, x, sigma, text):
        hidden = torch.tanh(x @ self.inner.T + self.level * sigma.reshape(-1, 1) + text @ self.text.T)
        return torch.nn.functional.dropout(hidden, self.dropout, self.training) @ self.outer.T

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters()])


def toy_velocity(field, batch=3, guidance=Guidance(), size=6):
    generator = torch.Generator().manual_seed(1)
    positive, negative = torch.randn(2, batch, size, generator=generator, dtype=torch.float64)
    return GuidedVelocity(field, {"text": positive}, {"text": negative}, guidance)


def toy_sigmas(num_steps):
    u = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    return torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])


def toy_rollout(field, plan, num_steps, batch=3, guidance=Guidance(), recompute=None, solver="euler"):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    renoise = [torch.randn(batch, 6, generator=generator, dtype=torch.float64) for _ in range(plan.num_renoised)]
    velocity = toy_velocity(field, batch, guidance)
    return rollout(velocity, noise, toy_sigmas(num_steps), plan, renoise, recompute, solver)


def as_recompute(plan, trajectory, velocity, params=None):
    """The reward input of one plan by `selective_recompute`: a call for the sample, and one for each re-noised copy.

    velocity: a GuidedVelocity's `replay`.  params: all of its network's unless given.
    """
    params = params or tuple(velocity.__self__.network.parameters())
    values, blocks, bridge = reward_input(plan, trajectory).split(len(trajectory.sample)), [], plan.active_bridge
    for output, value in enumerate(values):
        replays = [replay for replay in plan.replays if replay.output == output]
        nodes, weights = [replay.node for replay in replays], [replay.weight for replay in replays]
        latents, levels = [trajectory.latents[node] for node in nodes], [trajectory.level(node) for node in nodes]
        crossing = (nodes.index(bridge.node), bridge.alpha) if bridge and not output else None
        shares = [replay.share for replay in replays]
        blocks.append(
            selective_recompute(value, velocity, latents, levels, weights, crossing, shares=shares, params=params)
        )
    return torch.cat(blocks)


def toy_reward(z):
    return torch.sin(z).sum(dim=1) + 0.3 * (z * z).sum(dim=1)
