"""The dispatched quadrature_update, and its compiled kernel against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_kernels import quadrature_update, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(shape, num_nodes, dtype=torch.float32, cache_dtype=None, per_sample=False, num_cached=5, seed=0):
    """x, velocities, nodes, weights of a random update."""
    generator = torch.Generator().manual_seed(seed)
    table = (num_nodes, shape[0]) if per_sample else (num_nodes,)
    return (
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn((num_cached, *shape), generator=generator).to(cache_dtype or dtype),
        torch.randint(num_cached, table, generator=generator),
        torch.randn(table, generator=generator),
    )


def in_float64(x, velocities, nodes, weights):
    return on_reference(x.double(), velocities.double(), nodes, weights)


def on_reference(x, velocities, nodes, weights):
    nodes, weights = (t if t.dim() == 2 else t[:, None] for t in (nodes, weights))
    return reference.quadrature_update(x, velocities, nodes, weights)


def eager(x, velocities, nodes, weights):
    """What one writes without this package: a loop in the tensors' own dtype."""
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        x = x + weight * velocities[node]
    return x


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_agrees_with_the_reference(isa, dtype, cache_dtype, per_sample):
    inputs = problem((3, 4097), 5, dtype, cache_dtype, per_sample)
    result, expected = quadrature_update(*inputs), on_reference(*inputs)
    assert result.dtype == expected.dtype == dtype
    torch.testing.assert_close(result.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@given(
    shape=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    num_nodes=st.integers(0, 6),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, database=None)
def test_every_shape_dtype_and_rule_is_within_rounding_of_float64(shape, num_nodes, dtypes, per_sample, seed):
    inputs = problem(shape, num_nodes, *dtypes, per_sample=per_sample, seed=seed)
    result = quadrature_update(*inputs)
    assert result.shape == inputs[0].shape
    torch.testing.assert_close(result.double(), in_float64(*inputs), rtol=torch.finfo(dtypes[0]).eps, atol=1e-5)


def test_a_rule_a_sample_equals_each_sample_on_its_own(isa):
    x, velocities, nodes, weights = problem((4, 41), 3, per_sample=True)
    together = quadrature_update(x, velocities, nodes, weights)
    for b in range(4):
        one = slice(b, b + 1)
        alone = quadrature_update(x[one], velocities[:, one].contiguous(), nodes[:, b], weights[:, b])
        assert torch.equal(together[one], alone)


def test_the_kernel_reads_and_writes_across_its_threads(isa):
    x, velocities, nodes, weights = problem((3, 300_001), 2, num_cached=2)
    expected = x.double() + weights[0] * velocities[nodes[0]].double() + weights[1] * velocities[nodes[1]].double()
    torch.testing.assert_close(quadrature_update(x, velocities, nodes, weights).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("choice", ["cpu", "reference"])
def test_a_velocity_of_weight_zero_is_not_read(isa, monkeypatch, choice):
    monkeypatch.setenv("FLOWBP_KERNELS", choice)
    x, velocities, _, _ = problem((2, 41), 3)
    velocities[1] = math.nan
    nodes, weights = torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.0, -0.5])
    expected = eager(x, velocities, nodes[[0, 2]], weights[[0, 2]])
    torch.testing.assert_close(quadrature_update(x, velocities, nodes, weights), expected)
    one_sample = torch.tensor([[0.5, 0.5], [0.0, 1.0], [-0.5, -0.5]])
    result = quadrature_update(x, velocities, nodes, one_sample)
    assert result[0].isfinite().all() and result[1].isnan().all()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_kernel_gradients_are_the_float64_ones_rounded_once(isa, cache_dtype, per_sample):
    x, velocities, nodes, weights = problem((3, 41), 5, torch.float32, cache_dtype, per_sample)
    g = torch.randn(3, 41, generator=torch.Generator().manual_seed(1))
    leaves = x.requires_grad_(), velocities.requires_grad_()
    wide = x.detach().double().requires_grad_(), velocities.detach().double().requires_grad_()
    gradients = torch.autograd.grad(quadrature_update(*leaves, nodes, weights), leaves, g)
    exact = torch.autograd.grad(on_reference(*wide, nodes, weights), wide, g.double())
    for leaf, gradient, expected in zip(leaves, gradients, exact, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(leaf.dtype).eps, atol=1e-6)


def test_gradient_is_one_to_x_and_the_weight_to_the_velocity(isa):
    x, velocities, _, _ = problem((2, 3), 1)
    x.requires_grad_(), velocities.requires_grad_()
    quadrature_update(x, velocities, [1, 3, 1], [0.5, -2.0, 0.25]).sum().backward()
    assert (x.grad == 1).all()
    assert velocities.grad[:, 0, 0].tolist() == [0.0, 0.75, 0.0, -2.0, 0.0]


def test_a_velocity_that_is_not_read_has_gradient_zero_whatever_comes_back(isa):
    x, velocities, _, _ = problem((2, 3), 1)
    quadrature_update(x, velocities.requires_grad_(), [1, 3], [0.0, 0.5]).backward(torch.full((2, 3), math.inf))
    assert velocities.grad[:, 0, 0].tolist() == [0.0, 0.0, 0.0, math.inf, 0.0]


def test_float64_and_strided_tensors_run_on_the_reference(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    x, velocities, nodes, weights = problem((4, 6), 3)
    expected = quadrature_update(x, velocities, nodes, weights)
    wide = quadrature_update(x.double(), velocities.double(), nodes, weights)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected)
    strided = velocities.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(quadrature_update(x, strided, nodes, weights), expected)


def test_a_strided_latent_is_made_contiguous_for_the_kernel(isa):
    x, velocities, nodes, weights = problem((4, 6), 3)
    strided = x.T.contiguous().T
    assert torch.equal(
        quadrature_update(strided, velocities, nodes, weights), quadrature_update(x, velocities, nodes, weights)
    )


def test_the_compiled_op_refuses_what_would_lead_out_of_bounds(isa):
    x, velocities, nodes, weights = problem((3, 41), 2)
    quadrature_update(x, velocities, nodes, weights)  # loads the extension
    nodes, weights, out = nodes[:, None], weights[:, None].double(), torch.empty(3, 41)
    op = torch.ops.flowbp_compiled.quadrature_update
    op(x, velocities, nodes, weights, None, out)
    for bad in (
        (x, velocities, nodes + 5, weights, None, out),
        (x, velocities, nodes - 5, weights, None, out),
        (x, velocities, nodes, weights[:1], None, out),
        (x, velocities, nodes, weights.float(), None, out),
        (x, velocities, nodes.repeat(1, 2), weights, None, out),
        (x, velocities[:, :2].contiguous(), nodes, weights, None, out),
        (x, velocities[:, :, ::2], nodes, weights, None, out),
        (x.double(), velocities, nodes, weights, None, out),
        (x, velocities, nodes, weights, torch.ones(4, 3), out),
        (x, velocities, nodes, weights, None, out[:2]),
        (x, velocities, nodes, weights, None, out.half()),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            op(*bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_compiles_without_graph_breaks(dtype, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    compiled_update = torch.compile(quadrature_update, backend="aot_eager", fullgraph=True)
    for seed in range(2):  # a new plan of the same size reuses the graph
        x, velocities, nodes, weights = problem((3, 41), 2, dtype, seed=seed)
        leaves = x.requires_grad_(), velocities.requires_grad_()
        result, expected = (op(*leaves, nodes, weights) for op in (compiled_update, quadrature_update))
        assert torch.equal(result, expected)
        for mine, theirs in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (result, expected)), strict=True):
            assert torch.equal(mine, theirs)


def test_inputs_outside_the_contract_raise_and_say_why(isa):
    x, velocities, nodes, weights = problem((3, 41), 2)
    with pytest.raises(ValueError, match="node 5 is not in the cache; its 5 velocities count from 0"):
        quadrature_update(x, velocities, [0, 5], weights)
    with pytest.raises(ValueError, match=r"velocities must be \[N, \*x.shape\]"):
        quadrature_update(x, velocities[0], nodes, weights)
