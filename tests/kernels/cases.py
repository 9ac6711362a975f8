"""Random problems for every op, each beside what one writes without this package."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flowbp_kernels import bridge_cotangents, cfg_euler_step, cfg_multistep_step, leap_residuals, quadrature_update

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 41), (2, 4097), (3, 2, 5, 9), (0, 4), (3, 0)]
NUM_CACHED = 5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rule(num_nodes, batch, per_sample, seed=9):
    table = (num_nodes, batch) if per_sample else (num_nodes,)
    return torch.randint(NUM_CACHED, table, generator=torch.Generator().manual_seed(seed)), draw(*table, seed=seed)


def column(weight, like):
    """A weight [] or [B], to multiply [B, *S] in its dtype."""
    return (
        weight.to(like.dtype).reshape(weight.shape + (1,) * (like.dim() - weight.dim()))
        if weight.dim()
        else weight.to(like.dtype)
    )


def eager_sum(x, cache, nodes, weights):
    """A loop in the tensors' own dtype."""
    for node, weight in zip(nodes, weights, strict=True):
        velocity = cache[node] if node.dim() == 0 else cache[node, torch.arange(len(node))]
        x = x + column(weight, x) * velocity
    return x


@dataclass
class Op:
    """arguments(shape, num_nodes, dtype, per_sample): `num_tensors` on a device, then its rule, which travels by value
    from the CPU.

    call and eager take them and return a tuple of tensors.
    """

    num_tensors: int
    arguments: Callable
    call: Callable
    eager: Callable

    def to(self, device, arguments, rule_too=False):
        return [a.to(device) if i < self.num_tensors or rule_too else a for i, a in enumerate(arguments)]


def quadrature_arguments(shape, num_nodes, dtype, per_sample):
    return (
        draw(*shape, dtype=dtype),
        draw(NUM_CACHED, *shape, dtype=dtype, seed=1),
        *rule(num_nodes, shape[0], per_sample),
    )


def leap_arguments(shape, num_nodes, dtype, per_sample):
    latents = (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))
    nodes, first = rule(num_nodes, shape[0], per_sample)
    return *latents, draw(NUM_CACHED, *shape, dtype=dtype, seed=3), nodes, first, first.flip(0)


def leap_call(x_k, x_j, x_end, cache, nodes, first, second):
    landings = torch.empty(
        2, *x_k.shape, dtype=torch.float64 if x_k.dtype == torch.float64 else torch.float32, device=x_k.device
    )
    return leap_residuals(x_k, x_j, x_end, cache, nodes, (first, second), predictions_out=landings), landings


def leap_eager(x_k, x_j, x_end, cache, nodes, first, second):
    landings = [eager_sum(x_k, cache, nodes, first), eager_sum(x_j, cache, nodes, second)]
    gaps = [(landing - target).abs().flatten(1).mean(1) for landing, target in zip(landings, (x_j, x_end), strict=True)]
    return torch.stack(gaps), torch.stack(landings)


def cfg_arguments(shape, num_nodes, dtype, per_sample):
    return *(draw(*shape, dtype=dtype, seed=seed) for seed in range(3)), torch.tensor(4.5), torch.tensor(-0.04)


def cfg_eager(x, v_cond, v_uncond, guidance, h):
    velocity = v_uncond + guidance * (v_cond - v_uncond)
    return x + h * velocity, velocity


def multistep_arguments(shape, num_nodes, dtype, per_sample):
    """The cache lies behind the other tensors, before the rule: see multistep_call."""
    *tensors, guidance, h = cfg_arguments(shape, num_nodes, dtype, per_sample)
    cache = draw(NUM_CACHED, *shape, dtype=dtype, seed=3)
    return *tensors, cache, guidance, h, *rule(num_nodes, shape[0], per_sample)


def multistep_call(x, v_cond, v_uncond, cache, guidance, h, nodes, weights):
    return cfg_multistep_step(x, v_cond, v_uncond, guidance, h, cache, nodes, weights)


def multistep_eager(x, v_cond, v_uncond, cache, guidance, h, nodes, weights):
    return cfg_eager(eager_sum(x, cache, nodes, weights), v_cond, v_uncond, guidance, h)


def bridge_arguments(shape, num_nodes, dtype, per_sample):
    _, weights = rule(num_nodes, shape[0], per_sample)
    return draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), weights, weights.flip(0) / 4


def bridge_eager(g, g_x, weights, alphas):
    seeds = [column(w, g) * (g + column(a, g) * g_x) for w, a in zip(weights, alphas, strict=True)]
    return (torch.stack(seeds) if seeds else g.new_empty(0, *g.shape),)


OPS = {
    "quadrature_update": Op(2, quadrature_arguments, lambda *a: (quadrature_update(*a),), lambda *a: (eager_sum(*a),)),
    "leap_residuals": Op(4, leap_arguments, leap_call, leap_eager),
    "cfg_euler_step": Op(3, cfg_arguments, cfg_euler_step, cfg_eager),
    "cfg_multistep_step": Op(4, multistep_arguments, multistep_call, multistep_eager),
    "bridge_cotangents": Op(2, bridge_arguments, lambda *a: (bridge_cotangents(*a),), bridge_eager),
}
