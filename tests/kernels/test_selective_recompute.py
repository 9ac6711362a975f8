"""selective_recompute against the ordinary autograd graph of the same surrogate, and everything it must refuse."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowbp_kernels import RngState, selective_recompute
from flowbp_kernels.bench.measure import peak_memory

SIGMAS = (0.9, 0.7, 0.4, 0.1)
WEIGHTS = (-0.2, -0.3, 0.0, -0.4)  # the third node is only read from the cache


class Network(nn.Module):
    def __init__(self, dropout=0.0, width=16):
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(6, width), nn.Linear(width, 5), nn.Dropout(dropout)

    def forward(self, x, sigma):
        return self.outer(self.dropout(torch.tanh(self.inner(torch.cat([x, torch.full_like(x[:, :1], sigma)], 1)))))


def problem(dtype=torch.float64, **settings):
    """A network, a cached endpoint and the cached inputs of its nodes."""
    torch.manual_seed(0)
    network = Network(**settings).to(dtype)
    latents = [torch.randn(3, 5, dtype=dtype) for _ in SIGMAS]
    return network, torch.randn(3, 5, dtype=dtype), latents


def as_graph(value, velocity, latents, bridge=None):
    """One ordinary graph with the endpoint's value and the sweep's gradient: value + sum_i w_i (v_i - stop(v_i))."""
    surrogate = gate = 0.0
    for i, (x, sigma, weight) in enumerate(zip(latents, SIGMAS, WEIGHTS, strict=True)):
        if bridge is not None and i == bridge[0]:
            gate = bridge[1] * surrogate
        v = velocity(x + gate if bridge is not None and i == bridge[0] else x, sigma)
        surrogate = surrogate + weight * (v - v.detach()).to(value.dtype)
    return value + surrogate


def recompute(network, value, latents, velocity=None, **options):
    options = {"params": network.parameters(), **options}
    velocity = network if velocity is None else velocity
    return selective_recompute(value, velocity, latents, SIGMAS, WEIGHTS, **options)


def gradients(endpoint, network):
    return torch.autograd.grad(endpoint.sin().sum(), tuple(network.parameters()))


def assert_equal(mine, theirs, tolerance=1e-12):
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bridge", [None, (1, 0.3), (3, 1.0), (0, 0.5), (2, 0.5), (1, 0.0)], ids=str)
def test_gradient_equals_that_of_the_graph(bridge):
    network, value, latents = problem()
    endpoint = recompute(network, value, latents, bridge=bridge)
    assert torch.equal(endpoint, value)
    assert_equal(gradients(endpoint, network), gradients(as_graph(value, network, latents, bridge), network))


def test_the_bridge_matters_and_alpha_zero_cuts_it():
    network, value, latents = problem()
    plain, cut, bridged = (
        gradients(recompute(network, value, latents, bridge=b), network)[0] for b in (None, (3, 0), (3, 1))
    )
    assert torch.equal(plain, cut)
    assert not torch.allclose(plain, bridged, rtol=1e-3)


def test_nodes_are_replayed_clean_end_first_and_only_where_they_have_a_weight():
    network, value, latents = problem()
    replayed = []

    def velocity(x, sigma):
        replayed.append(sigma)
        return network(x, sigma)

    endpoint = recompute(network, value, latents, velocity)
    assert replayed == []
    endpoint.sum().backward()
    assert replayed == [0.1, 0.7, 0.9]


def test_one_network_graph_is_alive_at_a_time():
    network, value, latents = problem()
    alive, most = set(), 0

    def velocity(x, sigma):
        nonlocal most
        v = network(x, sigma)
        mark = nn.Parameter()
        v.grad_fn.metadata["mark"] = mark  # dies with the graph
        alive.add(sigma)
        weakref.finalize(mark, alive.discard, sigma)
        most = max(most, len(alive))
        return v

    recompute(network, value, latents, velocity, bridge=(1, 0.3)).sum().backward()
    assert most == 1


def test_a_checkpointed_network_gives_the_same_gradient():
    network, value, latents = problem()

    def velocity(x, sigma):
        return checkpoint(network, x, sigma, use_reentrant=False)

    expected = gradients(as_graph(value, network, latents, (1, 0.3)), network)
    assert_equal(gradients(recompute(network, value, latents, velocity, bridge=(1, 0.3)), network), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_draws_the_masks_of_the_rollout_again(checkpointed):
    network, value, latents = problem(dropout=0.4)
    rng_states = []

    def recorded(x, sigma):
        rng_states.append(RngState.capture())
        return network(x, sigma)

    def velocity(x, sigma):
        return checkpoint(network, x, sigma, use_reentrant=False) if checkpointed else network(x, sigma)

    expected = gradients(as_graph(value, recorded, latents, (1, 0.3)), network)
    endpoint = recompute(network, value, latents, velocity, bridge=(1, 0.3), rng_states=rng_states)
    before = torch.get_rng_state()
    mine = gradients(endpoint, network)
    assert torch.equal(torch.get_rng_state(), before), "the replay must leave the random state as it finds it"
    assert_equal(mine, expected)


def test_dropout_without_the_states_of_the_rollout_is_refused():
    network, value, latents = problem(dropout=0.4)
    with pytest.raises(RuntimeError, match=r"drew random numbers.*Pass rng_states.*eval\(\)"):
        recompute(network, value, latents).sum().backward()
    network.eval()
    recompute(network, value, latents).sum().backward()


def test_autocast_of_the_call_is_entered_again_in_backward():
    network, value, latents = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        endpoint = recompute(network, value, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # a shared bfloat16 weight would sum in it
        expected = as_graph(value, network, latents)
    in_float32 = gradients(recompute(network, value, latents), network)
    mine, theirs = gradients(endpoint, network), gradients(expected, network)
    assert_equal(mine, theirs, 1e-6)
    assert (mine[0] - in_float32[0]).abs().max() > 1e-4
    outside, graph = recompute(network, value, latents), as_graph(value, network, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(gradients(outside, network), gradients(graph, network), 1e-6)


def test_low_precision_parameters_accumulate_in_float32():
    parameter = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    latents = [torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16) for _ in range(64)] + [torch.ones(1, 1).bfloat16()]
    endpoint = selective_recompute(
        torch.ones(1, 1), lambda x, sigma: parameter * x, latents, [0.5] * 65, [1.0] * 65, params=[parameter]
    )
    endpoint.sum().backward()
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.item() == 1.125  # bfloat16 sums would stay at 1


def test_gradients_of_parameters_that_share_storage_of_a_gradient_stay_apart():
    a, b = (torch.zeros(1, 1, requires_grad=True) for _ in range(2))
    x = torch.ones(1, 1)
    endpoint = selective_recompute(x, lambda x, sigma: a + b, [x, x], [0.5, 0.5], [1.0, 2.0], params=[a, b])
    endpoint.sum().backward()
    assert (a.grad.item(), b.grad.item()) == (3.0, 3.0)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2.5), (torch.float32, 1.5)])
def test_of_all_gradients_only_the_wide_sums_lie_in_memory_at_once(dtype, most):
    """In bytes of the parameters: 2 of bfloat16 or 1 of float32, and what one layer of 16 takes."""
    layers = [nn.Linear(128, 128, bias=False, dtype=dtype) for _ in range(16)]
    network, x = nn.Sequential(*layers), torch.ones(1, 128, dtype=dtype)
    weights = tuple(network.parameters())
    endpoint = selective_recompute(
        x, lambda x, sigma: network(x), [x] * 3, [0.9, 0.5, 0.1], [-0.4, -0.4, -0.1], params=weights
    )
    peak = peak_memory(lambda: torch.autograd.grad(endpoint.sum(), weights, retain_graph=True), "cpu")
    assert 1 <= peak / sum(w.nbytes for w in weights) <= most


def test_a_parameter_that_only_some_nodes_use_gets_their_gradient():
    a, b = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    x = torch.ones(1, 1)
    endpoint = selective_recompute(
        x, lambda x, sigma: a * x if sigma > 0.5 else b * x, [x, x], [0.9, 0.1], [2.0, 3.0], params=[a, b]
    )
    endpoint.sum().backward()
    assert (a.grad.item(), b.grad.item()) == (2.0, 3.0)


def test_a_frozen_network_at_the_bridge_hands_on_the_gradient_of_its_input():
    """Of two experts for high and low noise, say, the second is not trained."""
    network, value, latents = problem()
    frozen = Network(width=8).to(value.dtype).requires_grad_(False)

    def velocity(x, sigma):
        return (frozen if sigma == SIGMAS[3] else network)(x, sigma)

    half, whole = (gradients(recompute(network, value, latents, velocity, bridge=(3, a)), network) for a in (0.5, 1.0))
    assert_equal(half, gradients(as_graph(value, velocity, latents, (3, 0.5)), network))
    assert not torch.allclose(half[0], whole[0], rtol=1e-3)


def test_backward_behaves_like_any_other_graph():
    network, value, latents = problem()
    seen = []
    network.inner.weight.register_post_accumulate_grad_hook(seen.append)
    loss = recompute(network, value, latents).sin().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in network.parameters()]
    loss.backward()
    assert_equal([p.grad for p in network.parameters()], [2 * g for g in once])
    assert len(seen) == 2
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with torch.no_grad():
        assert not recompute(network, value, latents).requires_grad


def test_a_compiled_loop_breaks_its_graph_and_keeps_the_gradient():
    network, value, latents = problem()
    expected = gradients(recompute(network, value, latents), network)

    def loop():
        return recompute(network, 1.0 * value, latents).sin().sum()

    torch.compile(loop, backend="eager")().backward()
    assert_equal([p.grad for p in network.parameters()], expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no graph can hold"):
        torch.compile(loop, backend="eager", fullgraph=True)()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    assert_equal(gradients(recompute(network, value, latents, compiled), network), expected)


@pytest.mark.parametrize("sweep_first", [False, True])
def test_a_compiled_velocity_is_traced_once_for_all_steps(sweep_first):
    """With and without gradient, that is: nothing that a sweep does for itself may make the next one trace it anew."""
    network, value, latents = problem()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, sigma: network(x, x.new_tensor(sigma)), backend=backend, dynamic=False)
    if not sweep_first:
        compiled(latents[0], SIGMAS[0])
    for _ in range(3):
        selective_recompute(
            value, compiled, latents[:1], SIGMAS[:1], WEIGHTS[:1], params=network.parameters()
        ).sum().backward()
    assert len(traced) == 1
    assert not torch.nn.modules.module._has_any_global_hook()


class Normalised(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5, **settings)

    def forward(self, x, sigma):
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda network: network, lambda network: torch.compile(network, backend="eager")],
    ids=["eager", "compiled"],
)
def test_running_statistics_count_no_replay(wrap):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def sweep(network, velocity):
        with torch.no_grad():
            velocity(x, 0.5)
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        try:
            selective_recompute(
                x, velocity, [x, x], [0.9, 0.1], [-0.8, -0.1], params=network.parameters()
            ).sum().backward()
        finally:
            assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())

    network = Normalised()
    with pytest.raises(RuntimeError, match=r"BatchNorm1d in training mode would count each replay.*eval\(\)"):
        sweep(network, wrap(network))
    sweep(network.eval(), wrap(network))
    network = Normalised(track_running_stats=False)
    sweep(network, wrap(network))


def test_a_second_derivative_is_refused():
    network, value, latents = problem()
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(recompute(network, value, latents).sum(), network.inner.weight, create_graph=True)


def test_parameters_changed_before_backward_are_refused():
    network, value, latents = problem()
    loss = recompute(network, value, latents).sum()
    with torch.no_grad():
        network.inner.bias += 1
    with pytest.raises(RuntimeError, match="changed in place.*before optimizer.step"):
        loss.backward()


def test_a_gradient_hook_that_would_run_once_a_node_is_refused():
    network, value, latents = problem()
    loss = recompute(network, value, latents).sum()
    network.inner.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(RuntimeError, match="use register_post_accumulate_grad_hook"):
        loss.backward()


def test_latents_changed_before_backward_are_refused():
    network, value, latents = problem()
    loss = recompute(network, value, latents).sum()
    latents[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "velocity, bridge, message",
    [
        (lambda network: lambda x, s: network(x, s).detach(), None, "without graph"),
        (lambda network: torch.no_grad()(network.forward), None, "without graph"),
        (lambda network: lambda x, s: network(x, s)[:, :1], None, r"shape \(3, 1\) for a latent of shape \(3, 5\)"),
        (lambda network: lambda x, s: network(x.detach(), s), (1, 0.3), "does not depend on its input"),
        (lambda network: lambda x, s: network.outer(x.new_ones(3, 16)), None, "2 of 4 params took no part"),
        (lambda network: Network().double(), None, "4 of 4 params took no part"),
    ],
)
def test_a_replay_that_would_lose_gradient_is_refused(velocity, bridge, message):
    network, value, latents = problem()
    with pytest.raises(RuntimeError, match=message):
        recompute(network, value, latents, velocity(network), bridge=bridge).sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"params": []}, "params is empty"),
        ({"params": [torch.ones(1)]}, "1 of 1 params do not require grad"),
        ({"params": [nn.Parameter(torch.ones(1))] * 2}, "names a parameter twice"),
        ({"value": torch.ones(3, 5, requires_grad=True)}, r"value requires grad.*pass value.detach\(\)"),
        ({"latents": [torch.ones(3, 5, requires_grad=True)] * 2}, r"latents\[0\] requires grad"),
        ({"latents": [torch.ones(3, 5), torch.ones(3, 4)]}, r"latents\[1\] has shape \(3, 4\), the endpoint \(3, 5\)"),
        ({"latents": [torch.ones(3, 5)]}, "one entry a node; got {'latents': 1, 'sigmas': 2"),
        ({"rng_states": [RngState.capture()]}, "'rng_states': 1"),
        ({"sigmas": [0.1, 0.9]}, "sigmas increase"),
        ({"grad_weights": [0.0, 0.0]}, "no node has a weight"),
        ({"grad_weights": [1.0, float("nan")]}, "grad_weights must be finite"),
        ({"bridge": (2, 0.5)}, "bridge position 2 is not a node; there are 2"),
        ({"bridge": (0, 1.5)}, r"alpha must lie in \[0, 1\], not 1.5"),
        ({"bridge": (0, float("nan"))}, "alpha must lie in"),
    ],
)
def test_inputs_outside_the_contract_raise_and_say_why(change, message):
    inputs = {
        "value": torch.ones(3, 5),
        "velocity": lambda x, sigma: x,
        "latents": [torch.ones(3, 5)] * 2,
        "sigmas": [0.9, 0.1],
        "grad_weights": [-0.8, -0.1],
        "params": [nn.Parameter(torch.ones(1))],
    }
    with pytest.raises(ValueError, match=message):
        selective_recompute(**{**inputs, **change})


DISTRIBUTED = r"""
import re, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from flowbp_kernels import selective_recompute

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def gradient(wrap, velocity, rank, **options):
    torch.manual_seed(0)
    network = nn.Linear(5, 5).double()
    wrapped = wrap(network)
    torch.manual_seed(1 + rank)
    latents = [torch.randn(3, 5).double() for _ in range(3)]
    endpoint = selective_recompute(
        torch.randn(3, 5).double(), lambda x, sigma: velocity(wrapped)(x).tanh(), latents, [0.9, 0.5, 0.1],
        [-0.4, -0.4, -0.1], bridge=(1, 0.3), params=network.parameters(), **options)
    endpoint.sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])

alone = lambda r: gradient(lambda n: n, lambda n: n, r, reduces_gradients=True)
mean = (alone(0) + alone(1)) / 2
reduced = gradient(DistributedDataParallel, lambda ddp: ddp, rank)
assert torch.allclose(reduced, mean, rtol=1e-12, atol=1e-12), (reduced - mean).abs().max()
static = lambda n: DistributedDataParallel(n, static_graph=True)
for wrap, velocity, message in (
    (DistributedDataParallel, lambda ddp: ddp.module, "there are 2 ranks and velocity did not call .*Call the wrapper"),
    (lambda n: n, lambda n: n, "there are 2 ranks and velocity did not call .*Call the wrapper"),
    (static, lambda ddp: ddp, r"DistributedDataParallel\(static_graph=True\) .* Leave static_graph out"),
):
    try:
        gradient(wrap, velocity, rank)
    except RuntimeError as error:
        assert re.match(message, str(error)), error
    else:
        raise AssertionError("gradients that are not reduced must be refused")
sharded = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,))))
try:
    selective_recompute(torch.ones(3), lambda x, s: x, [torch.ones(3)], [0.5], [1.0], params=[sharded])
except ValueError as error:
    assert "params are sharded (DTensor, FSDP2)" in str(error)
else:
    raise AssertionError("sharded parameters must be refused")
dist.destroy_process_group()
"""


@pytest.fixture
def two_processes(tmp_path):
    """Runs a script as two processes, which it tells their rank and where they meet."""
    ranks = []

    def run(script):
        command, pipes = [sys.executable, "-c", script], {"stderr": subprocess.PIPE, "text": True}
        ranks.extend(subprocess.Popen([*command, str(r), str(tmp_path / "store")], **pipes) for r in range(2))
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors

    yield run
    for rank in ranks:
        rank.kill()


def test_ddp_reduces_the_replayed_gradients_and_ways_round_it_are_refused(two_processes):
    two_processes(DISTRIBUTED)
