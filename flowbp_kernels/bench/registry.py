"""What is measured: each op on the latents of real models, and the PyTorch that trainers write today instead of it."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

import flowbp_kernels
from flowbp_kernels.bench import network
from flowbp_kernels.bench.case import DTYPES, Case, Problem, draw, with_sum


def cases(ops, latents, batches, steps, dtypes) -> Iterator[Case]:
    """Every combination in which the op works on such a tensor, and the number of steps changes something."""
    for op, latent, batch, num_steps, dtype in product(ops, latents, batches, steps, dtypes):
        of_network = latent == "tiny" or (op in network.OPS) == latent.endswith("-block")
        if of_network and (has_rows(op) or num_steps == steps[0]):
            yield Case(op, latent, batch, num_steps if has_rows(op) else 1, dtype)


def has_rows(op: str) -> bool:
    """Whether the op's size depends on the number of steps."""
    return op not in ("cfg_euler_step", "cfg_multistep_step", "straight_through", *network.OPS)


def footprint(case: Case, modes: Sequence[str]) -> int:
    """Bytes that measuring a case takes, about: its tensors, their gradients, and the copy that it is compared with."""
    copies = 12 if case.op in network.OPS else 4  # the hidden layer of a block is four times as wide
    # The outputs of this op are as large as a cache, and for backward every provider keeps its own.
    if case.op == "bridge_cotangents":
        copies = 8 if list(modes) == ["forward"] else 12
    return copies * (case.steps + 6) * torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize


def problem(case: Case, device: str) -> Problem:
    return OPS[case.op](case, device)


def quadrature_update(case: Case, device: str) -> Problem:
    x, velocities = draw(case, device), draw(case, device, case.steps)
    nodes, weights = list(range(case.steps)), _weights(case)
    out = torch.empty_like(x)

    def eager(x, velocities):
        for node, weight in zip(nodes, weights, strict=True):
            x = x + weight * velocities[node]
        return x

    def einsum(x, velocities):
        return x + torch.einsum("k,k...->...", torch.tensor(weights, dtype=x.dtype, device=x.device), velocities)

    def baddbmm(x, velocities):
        row = torch.tensor(weights, dtype=x.dtype, device=x.device).reshape(1, 1, -1)
        return torch.baddbmm(x.reshape(1, 1, -1), row, velocities.reshape(1, len(nodes), -1)).reshape(x.shape)

    def fused(x, velocities):
        total = x.float()
        for node, weight in zip(nodes, weights, strict=True):
            total = total + weight * velocities[node].float()
        return total.to(x.dtype)

    return Problem(
        inputs=(x, velocities),
        ours=lambda x, velocities: flowbp_kernels.quadrature_update(x, velocities, nodes, weights),
        ours_into=lambda x, velocities: flowbp_kernels.quadrature_update(x, velocities, nodes, weights, out=out),
        to_compile=fused,
        baselines={"eager": eager, "einsum": einsum, "baddbmm": baddbmm},
        leaves=(0, 1),
        # Backward reads g, which is the gradient of x, and writes the gradient of every row.
        traffic=_traffic(x, forward=case.steps + 2, backward=case.steps + 1),
    )


def leap_residuals(case: Case, device: str) -> Problem:
    x_k, x_j, x_end, velocities = (*(draw(case, device) for _ in range(3)), draw(case, device, case.steps))
    nodes, weights, split = list(range(case.steps)), _weights(case), case.steps // 2
    leaps = weights[:split] + [0.0] * (case.steps - split), [0.0] * split + weights[split:]

    def eager(x_k, x_j, x_end, velocities):
        gaps = []
        for x, target, part in ((x_k, x_j, nodes[:split]), (x_j, x_end, nodes[split:])):
            for node in part:
                x = x + weights[node] * velocities[node]
            gaps.append((x.float() - target.float()).abs().flatten(1).mean(1))
        return torch.stack(gaps)

    def einsum(x_k, x_j, x_end, velocities):
        table = torch.tensor(weights, dtype=x_k.dtype, device=x_k.device)
        first = x_k + torch.einsum("k,k...->...", table[:split], velocities[:split])
        second = x_j + torch.einsum("k,k...->...", table[split:], velocities[split:])
        return torch.stack(
            [(a.float() - b.float()).abs().flatten(1).mean(1) for a, b in ((first, x_j), (second, x_end))]
        )

    def fused(x_k, x_j, x_end, velocities):
        gaps = []
        for x, target, part in ((x_k, x_j, nodes[:split]), (x_j, x_end, nodes[split:])):
            total = x.float()
            for node in part:
                total = total + weights[node] * velocities[node].float()
            gaps.append((total - target.float()).abs().flatten(1).mean(1))
        return torch.stack(gaps)

    def ours(x_k, x_j, x_end, velocities):
        return flowbp_kernels.leap_residuals(x_k, x_j, x_end, velocities, nodes, leaps)

    return Problem(
        inputs=(x_k, x_j, x_end, velocities),
        ours=ours,
        ours_into=ours,
        to_compile=fused,
        baselines={"eager": eager, "einsum": einsum},
        leaves=(),
        traffic=_traffic(x_k, forward=case.steps + 3),
    )


def cfg_euler_step(case: Case, device: str) -> Problem:
    x, v_cond, v_uncond = (draw(case, device) for _ in range(3))
    guidance, h = 4.5, -0.04
    latent_slot, velocity_slot = torch.empty_like(x), torch.empty_like(x)

    def eager(x, v_cond, v_uncond):
        v = v_uncond + guidance * (v_cond - v_uncond)
        x_next = x + h * v
        if not v.requires_grad:
            velocity_slot.copy_(v)
            latent_slot.copy_(x_next)
        return x_next, v

    def fused(x, v_cond, v_uncond):
        v = (v_uncond.float() + guidance * (v_cond.float() - v_uncond.float())).to(v_cond.dtype)
        return (x.float() + h * v.float()).to(x.dtype), v

    return Problem(
        inputs=(x, v_cond, v_uncond),
        ours=lambda *tensors: flowbp_kernels.cfg_euler_step(*tensors, guidance=guidance, h=h),
        ours_into=lambda *tensors: flowbp_kernels.cfg_euler_step(
            *tensors, guidance=guidance, h=h, velocity_out=velocity_slot, out=latent_slot
        ),
        to_compile=fused,
        baselines={"eager": eager},
        leaves=(0, 1, 2),
        traffic=_traffic(x, forward=5, backward=4),
    )


def cfg_multistep_step(case: Case, device: str) -> Problem:
    """Adams-Bashforth of order 3: two earlier velocities are read."""
    x, v_cond, v_uncond, velocities = (*(draw(case, device) for _ in range(3)), draw(case, device, 3))
    guidance, h, nodes, weights = 4.5, -0.077, [0, 1], [-0.017, 0.053]
    latent_slot, velocity_slot = torch.empty_like(x), torch.empty_like(x)

    def eager(x, v_cond, v_uncond, velocities):
        v = v_uncond + guidance * (v_cond - v_uncond)
        x_next = x + weights[0] * velocities[0] + weights[1] * velocities[1] + h * v
        if not v.requires_grad:
            velocity_slot.copy_(v)
            latent_slot.copy_(x_next)
        return x_next, v

    def fused(x, v_cond, v_uncond, velocities):
        v = (v_uncond.float() + guidance * (v_cond.float() - v_uncond.float())).to(v_cond.dtype)
        total = x.float() + weights[0] * velocities[0].float() + weights[1] * velocities[1].float()
        return (total + h * v.float()).to(x.dtype), v

    def ours(x, v_cond, v_uncond, velocities, **slots):
        step = x, v_cond, v_uncond, guidance, h
        return flowbp_kernels.cfg_multistep_step(*step, velocities, nodes, weights, **slots)

    return Problem(
        inputs=(x, v_cond, v_uncond, velocities),
        ours=ours,
        ours_into=lambda *tensors: ours(*tensors, velocity_out=velocity_slot, out=latent_slot),
        to_compile=fused,
        baselines={"eager": eager},
        leaves=(0, 1, 2, 3),
        # Backward reads the gradients of x_next, which is that of x, and of v, and writes those of v_cond, v_uncond and
        # of all three rows.
        traffic=_traffic(x, forward=7, backward=7),
    )


def bridge_cotangents(case: Case, device: str) -> Problem:
    g, g_x = draw(case, device), draw(case, device)
    weights, alphas = _weights(case), [0.3] * (case.steps // 2) + [0.0] * (case.steps - case.steps // 2)
    out = g.new_empty(case.steps, *g.shape)

    def eager(g, g_x):
        return torch.stack([weight * (g + alpha * g_x) for weight, alpha in zip(weights, alphas, strict=True)])

    def fused(g, g_x):
        wide, wide_x = g.float(), g_x.float()
        return torch.stack(
            [(weight * (wide + alpha * wide_x)).to(g.dtype) for weight, alpha in zip(weights, alphas, strict=True)]
        )

    return Problem(
        inputs=(g, g_x),
        ours=lambda g, g_x: flowbp_kernels.bridge_cotangents(g, g_x, weights, alphas),
        ours_into=lambda g, g_x: flowbp_kernels.bridge_cotangents(g, g_x, weights, alphas, out=out),
        to_compile=fused,
        baselines={"eager": eager},
        leaves=(0, 1),
        traffic=_traffic(g, forward=case.steps + 2, backward=case.steps + 2),
    )


def straight_through(case: Case, device: str) -> Problem:
    value, surrogate = draw(case, device), draw(case, device)

    def eager(value, surrogate):
        return value.detach() + 0.3 * (surrogate - surrogate.detach())

    def ours(value, surrogate):
        return flowbp_kernels.straight_through(value, surrogate, 0.3)

    return Problem(
        inputs=(value, surrogate),
        ours=ours,
        ours_into=ours,
        to_compile=eager,
        baselines={"eager": eager},
        leaves=(1,),
        traffic=_traffic(value, forward=2, backward=2),
    )


OPS = {
    op.__name__: op
    for op in (
        quadrature_update,
        leap_residuals,
        cfg_euler_step,
        cfg_multistep_step,
        bridge_cotangents,
        straight_through,
    )
} | network.OPS


def _weights(case: Case) -> list[float]:
    return [-(1 + k % 3) / (2 * case.steps) for k in range(case.steps)]


def _traffic(x: Tensor, **tensors_by_mode: int) -> dict[str, int]:
    """Bytes by mode, from the number of tensors like x that each mode reads and writes; "full" is the sum."""
    by_mode = {mode: count * x.nbytes for mode, count in tensors_by_mode.items()}
    return with_sum(by_mode)
