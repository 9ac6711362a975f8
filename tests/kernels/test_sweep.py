"""The sweep's arithmetic, without a network: what each node's backward pass starts from, and what a bridge adds."""

import pytest
import torch

from flowbp_kernels.sweep import Graph, sweep


def seeds_of(grads, passes, inputs_gradients=(), dtype=torch.float64):
    """The seeds [n B, *S] of a sweep whose bridges give back `inputs_gradients`, one after the other."""
    seeds, given = [], iter(inputs_gradients)

    def forward(replays):
        x = torch.zeros(len(replays) * len(grads[0]), *grads[0].shape[1:], dtype=dtype)
        gates = replays[0][2]
        return Graph(x.requires_grad_(any(gates) if isinstance(gates, tuple) else gates > 0), x.detach())

    def pull(x, v, seed):
        assert seed.shape == v.shape and seed.dtype == v.dtype
        seeds.append(seed)
        return next(given) if x.requires_grad else None

    sweep(grads, passes, forward, pull)
    assert next(given, None) is None
    return seeds


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nodes_past_the_bridge_also_start_from_what_came_back_through_it(dtype):
    g, g_x = draw(2, 3, 5, dtype=torch.float32), draw(3, 5, dtype=torch.float32)[:2, None].expand(2, 3, 5)
    passes = [
        [("d", -0.1, 0.0, 0, 1.0)],
        [("c", -0.2, 0.3, 0, 1.0)],
        [("b", 0.4, 0.0, 0, 1.0), ("a", -0.5, 0.0, 0, 0.5)],  # a, with half of its weight in the bridge
    ]
    seeds = seeds_of([g], passes, [g_x], dtype)
    past, half = (g.double() + alpha * g_x.double() for alpha in (0.3, 0.15))
    exact = [-0.1 * g.double(), -0.2 * g.double(), torch.cat([0.4 * past, -0.5 * half])]
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    for seed, expected in zip(seeds, exact, strict=True):  # float32 sums, which cancel where g and g_x do; one rounding
        torch.testing.assert_close(seed.double(), expected, rtol=rounding + 1e-7, atol=1e-7)


def test_each_sample_has_its_own_weight_and_its_own_bridge():
    g, first, second = draw(3, 4), draw(1, 3, 4)[0], draw(1, 1, 3, 4)[0, 0]
    passes = [
        [("d", (-0.1, -0.2, 0.3), (0.5, 0.0, 0.0), 0, 1.0)],
        [("c", -0.4, (0.0, 0.25, 0.0), 0, 1.0)],
        [("b", (0.6, 0.7, 0.8), 0.0, 0, (2.0, 3.0, 5.0))],
    ]
    seeds = seeds_of([g], passes, [first, second])
    cotangent = g + torch.tensor([[0.5], [0.0], [0.0]]) * first
    expected = [torch.tensor([[-0.1], [-0.2], [0.3]]) * g, -0.4 * cotangent]
    mixed = g + torch.tensor([[1.0], [0.0], [0.0]]) * first + torch.tensor([[0.0], [0.75], [0.0]]) * second
    expected.append(torch.tensor([[0.6], [0.7], [0.8]]) * mixed)
    for seed, exact in zip(seeds, expected, strict=True):
        torch.testing.assert_close(seed, exact.double(), rtol=1e-6, atol=1e-7)


def test_a_weight_or_a_gate_of_zero_cuts_its_sample_alone():
    poison = torch.tensor([[torch.nan], [1.0]])
    assert seeds_of([poison], [[("a", (0.0, 2.0), 0.0, 0, 1.0)]])[0].tolist() == [[0.0], [2.0]]
    passes = [[("b", 1.0, (0.0, 0.5), 0, 1.0)], [("a", 1.0, 0.0, 0, 1.0)]]
    assert seeds_of([torch.ones(2, 1)], passes, [poison])[1].tolist() == [[1.0], [1.5]]
    passes.insert(1, [("b", 1.0, (0.5, 0.0), 0, 1.0)])  # the sample whose bridge comes second
    assert seeds_of([torch.ones(2, 1)], passes, [poison, poison.flip(0)])[2].tolist() == [[1.5], [1.5]]


def test_a_node_starts_from_the_gradient_of_its_own_output():
    sample, copy = torch.ones(1, 1), torch.full((1, 1), 10.0)
    passes = [[("copy", 2.0, 0.0, 1, 1.0), ("c", 3.0, 0.0, 0, 1.0)], [("b", 1.0, 1.0, 0, 1.0)]]
    passes.append([("late copy", 1.0, 0.0, 1, 1.0), ("a", 1.0, 0.0, 0, 1.0)])
    seeds = seeds_of([sample, copy], passes, [torch.full((1, 1), 100.0)])
    assert [seed.flatten().tolist() for seed in seeds] == [[20.0, 3.0], [1.0], [10.0, 101.0]]
