"""Where the numbers of a rule come from: the host, with the call, or the device's memory, which nobody but the kernel
reads.
"""

import pytest
import torch
from kernels.cases import NUM_CACHED, OPS, draw, rule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowbp_kernels import (
    bridge_cotangents,
    cfg_euler_step,
    cfg_multistep_step,
    leap_residuals,
    quadrature_update,
    reference,
)

SHAPE = (3, 41)


@pytest.fixture
def by_reference(monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")


class Recorder(TorchDispatchMode):
    """The names of this package's operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flowbp_kernels":
            self.called.append(function._opname)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_the_host_reads_nothing_of_a_rule_on_the_device(name, per_sample):
    """A meta tensor holds no values: to read one, or to wait for one, raises."""
    op = OPS[name]
    arguments = op.to("meta", op.arguments(SHAPE, 4, torch.float32, per_sample), rule_too=True)
    for result, real in zip(
        op.call(*arguments), op.call(*op.arguments(SHAPE, 4, torch.float32, per_sample)), strict=True
    ):
        assert result.is_meta and (result.shape, result.dtype) == (real.shape, real.dtype)
    if name != "leap_residuals":  # which has no gradient
        leaves = [a.requires_grad_() for a in arguments[: op.num_tensors]]
        outputs = op.call(*arguments)
        gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
        assert all(
            gradient.is_meta and gradient.shape == leaf.shape for gradient, leaf in zip(gradients, leaves, strict=True)
        )


@pytest.mark.parametrize("name", OPS)
def test_the_device_of_a_rule_chooses_the_operator(name):
    op, arguments = OPS[name], OPS[name].arguments(SHAPE, 4, torch.float32, False)
    for place, form in (("cpu", ""), ("cuda", "_on_device")):
        with FakeTensorMode(), Recorder() as recorder:
            places = ["cuda"] * op.num_tensors + [place] * (len(arguments) - op.num_tensors)
            op.call(*(torch.empty(a.shape, dtype=a.dtype, device=p) for a, p in zip(arguments, places, strict=True)))
        name = name.replace("euler", "multistep")  # an Euler step is one without nodes
        assert recorder.called in ([name + form], [f"{name}_out{form}"])


def test_a_node_that_is_not_in_the_cache_shows_unless_its_weight_is_zero():
    """Of a rule on the device; one that comes from the host is refused. The kernels' own tests say the same."""
    x, cache, factors = draw(2, 7), draw(3, 2, 7, seed=1), draw(3, 2, seed=2)
    nodes = torch.tensor([[0, 0], [3, 2], [-1, 1], [2**40, 1]])
    everywhere, there = torch.ones(4, 1), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    for scales in (None, factors):
        unknown, known = reference.quadrature_update(x, cache, nodes, everywhere, scales)
        assert unknown.isnan().all() and known.isfinite().all()
        first = cache[0] if scales is None else cache[0] * scales[0, :, None]
        torch.testing.assert_close(reference.quadrature_update(x, cache, nodes, there, scales), x + first)
    with pytest.raises(ValueError, match="node 3 is not in the cache"):
        quadrature_update(x, cache, nodes[:2, 0], there[:2, 0])
    empty = torch.empty(0, 2, 7, device="meta")
    with pytest.raises(ValueError, match="there are 4 nodes and no velocities"):
        quadrature_update(x.to("meta"), empty, nodes.to("meta"), there.to("meta"))


def test_the_gradient_sums_the_weights_of_a_row_that_is_read_more_than_once(by_reference):
    x, cache = draw(2, 7), draw(3, 2, 7, seed=1).requires_grad_()
    nodes, weights = torch.tensor([[0, 2], [0, 1], [2, 2], [0, 1]]), draw(4, 2, seed=2)
    quadrature_update(x, cache, nodes, weights).sum().backward()
    expected = torch.zeros(3, 2).index_put_((nodes, torch.arange(2).expand(4, 2)), weights, accumulate=True)
    torch.testing.assert_close(cache.grad, expected[:, :, None].expand(3, 2, 7))


def test_the_parts_of_a_rule_lie_in_one_place():
    x, cache = torch.empty(SHAPE, device="meta"), torch.empty(NUM_CACHED, *SHAPE, device="meta")
    nodes, weights = (part.to("meta") for part in rule(2, 3, False))
    for call in (
        lambda: quadrature_update(x, cache, [0, 1], weights),
        lambda: quadrature_update(x, cache, nodes, [0.5, 0.5]),
        lambda: leap_residuals(x, x, x, cache, nodes, (weights, [0.5, 0.5])),
        lambda: bridge_cotangents(x, x, weights, [0.5, 0.5]),
        lambda: cfg_euler_step(x, x, x, torch.tensor(4.5), weights[0]),
        lambda: cfg_multistep_step(x, x, x, 4.5, weights[0], cache, [0, 1], [0.5, 0.5]),
        lambda: cfg_multistep_step(x, x, x, torch.tensor(4.5), -0.1, cache, nodes, weights),
        lambda: cfg_multistep_step(x, x, x, 4.5, -0.1, cache, nodes, [0.5, 0.5]),
    ):
        with pytest.raises(ValueError, match="pass both as numbers or CPU tensors, or both on the device"):
            call()
    for joined in (
        cfg_euler_step(x, x, x, 4.5, weights[0]),
        cfg_multistep_step(x, x, x, 4.5, -0.1, cache, nodes, weights),
    ):
        assert joined[0].is_meta, "a number joins a tensor where that lies"


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind, graphs", [("tensor", 1), ("number", 2)])
def test_a_compiled_step_takes_every_size_and_guidance(kind, graphs, guided):
    """torch.compile takes the first float for a constant, and makes a second graph for all the others."""
    x, v_cond, v_uncond = (draw(*SHAPE, seed=seed) for seed in range(3))
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def step(x, guidance, h):
        return cfg_euler_step(x, v_cond, v_uncond if guided else None, guidance, h)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for i in range(12):
        guidance, h = torch.tensor(1.0 + i), torch.tensor(-0.1 / (i + 1))
        if kind == "number":
            guidance, h = guidance.item(), h.item()
        assert all(map(torch.equal, compiled(x, guidance, h), step(x, guidance, h)))
    assert len(traced) == graphs


def test_a_compiled_step_with_inductor_takes_every_size():
    x, v_cond, v_uncond = (draw(*SHAPE, seed=seed) for seed in range(3))

    def step(x, h):
        return cfg_euler_step(x, v_cond, v_uncond, 4.5, h)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for h in (-0.1 / (i + 1) for i in range(12)):  # one graph a value would end at 8
        assert all(map(torch.equal, compiled(x, h), step(x, h)))
