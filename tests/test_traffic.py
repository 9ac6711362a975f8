"""What counts as a launch and as bytes in docs/step_traffic.json and docs/compiled_traffic.json."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import step_traffic

from flowbp_kernels import quadrature_update

FLOAT32 = 4


def counted(call, *shapes, **options):
    """(launches, FLOPs, bytes) of call on tensors of the meta device."""
    tensors = [torch.empty(*shape, device="meta", **options) for shape in shapes]
    with step_traffic.as_on_a_gpu(), step_traffic.Traffic() as traffic:
        call(*tensors)
    return tuple(map(sum, zip(*traffic.ops.values(), strict=True))) or (0, 0, 0)


@pytest.mark.parametrize(
    "call, launches, elements",
    [
        (lambda x: x.t().reshape(4, 6)[1:].detach(), 1, 2 * 24),  # the reshape of a transpose is a copy
        (lambda x: x.view(6, 4)[1:].transpose(0, 1).expand(3, 4, 5), 0, 0),
        (lambda x: x * 2, 1, 2 * 24),
        (lambda x: x * x, 1, 2 * 24),
        (lambda x: x.add_(1), 1, 2 * 24),
        (lambda x: x.zero_(), 1, 24),
        (lambda x: x.copy_(x[:1]), 1, 6 + 24),
        (lambda x: x + x[:1].expand(4, 6), 1, 24 + 6 + 24),
        (lambda x: x.sum(0), 1, 24 + 6),
        (lambda x: torch.cat([x, x]), 1, 24 + 48),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: torch.ones(3) + 1, 0, 0),  # on the host
        (lambda x: F.layer_norm(x, (6,)), 1, 24 + 24 + 8),  # and mean and 1 / sigma of each row
        (lambda x: F.rms_norm(x, (6,)), 1, 24 + 24 + 4),
        (lambda x: torch.ops.aten.silu_backward(x, x), 1, 2 * 24),
    ],
)
def test_a_launch_reads_its_inputs_once_and_writes_its_outputs_once(call, launches, elements):
    assert counted(call, (4, 6)) == (launches, 0, FLOAT32 * elements)


def test_products_and_attention_count_their_flops():
    gemm = counted(lambda x, w, b: F.linear(x, w, b), (2, 3, 4), (5, 4), (5,))
    assert gemm == (1, 2 * 6 * 4 * 5, FLOAT32 * (24 + 20 + 5 + 30))
    launches, flops, _ = counted(lambda q: F.scaled_dot_product_attention(q, q, q), (2, 3, 7, 8))
    assert (launches, flops) == (1, 4 * 2 * 3 * 7 * 7 * 8)


def test_a_rule_reads_the_rows_that_it_names():
    launches, _, read = counted(lambda x, v: quadrature_update(x, v, [0, 2], [1.0, 2.0]), (4, 6), (9, 4, 6))
    assert (launches, read) == (1, FLOAT32 * 24 * (1 + 2 + 1))


def test_a_replay_of_lora_counts_the_products_that_a_gpu_runs():
    """Three GEMMs forward; backward two and two for x, one for each adapter, and x a^T once more."""

    def call(x, w, a, b):
        y = torch.ops.flowbp_kernels.lora_linear(x, w, None, None, a.requires_grad_(), b.requires_grad_(), 1.0)
        y.backward(torch.empty_like(y))

    x, w, a, b = (8, 16), (32, 16), (4, 16), (32, 4)
    _, flops, _ = counted(call, x, w, a, b)
    thin_in, thin_out = 2 * 8 * 16 * 4, 2 * 8 * 32 * 4
    assert flops == 2 * 8 * 16 * 32 + thin_in + thin_out + thin_out + thin_in + thin_out + thin_in


class Modulated(nn.Module):
    def forward(self, x, scale):
        return F.layer_norm(x, x.shape[-1:]) * (1 + scale)


def test_inductor_schedules_a_modulated_norm_as_one_kernel_of_its_inputs_and_outputs():
    import compiled_traffic  # inductor takes seconds to import

    tensors = [torch.empty(4, 512, 1024, device="meta"), torch.empty(4, 1, 1024, device="meta", requires_grad=True)]
    found = compiled_traffic.compiled(Modulated(), tuple(tensors), {})["pass"]
    outside = FLOAT32 * 1e-9 * (2 * 4 * 512 * 1024 + 4 * 1024)
    assert found == pytest.approx({"launches": 1, "gb_outside": outside, "gb_gemm": 0})
