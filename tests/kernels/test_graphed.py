"""Forward passes as CUDA graphs, with a stand-in for the graph: a closure over the buffers that it has recorded."""

import copy
from contextlib import contextmanager

import pytest
import torch
from recorded_graph import Recorder
from torch import nn

from flowbp_kernels import graphed
from flowbp_kernels.graphed import WARM_UP, GraphedForward, cuda_graph


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def graphed_forward(network):
    """(x, sigma, {"text": c}, factor) -> network(x) + sigma c, times a number."""

    def forward(x, sigma, conditioning, factor=1.0):
        return (network(x) + sigma * conditioning["text"]) * factor

    return GraphedForward(forward, Recorder(), "cpu")


def arguments(seed, batch=2, dtype=torch.float32):
    return draw(batch, 4, seed=seed, dtype=dtype), draw(1, seed=seed + 1)[0], {"text": draw(batch, 4, seed=seed + 2)}


@torch.no_grad()
def test_each_call_computes_with_its_own_arguments_and_no_later_one_changes_its_result(graphed_forward):
    results = [graphed_forward(*arguments(seed)) for seed in range(4)]
    expected = [graphed_forward.__wrapped__(*arguments(seed)) for seed in range(4)]
    assert all(map(torch.equal, results, expected)) and not torch.equal(*results[:2])


@torch.no_grad()
def test_arguments_are_read_and_never_written(graphed_forward):
    given = arguments(0)
    before = copy.deepcopy(given)
    graphed_forward(*given)
    graphed_forward(*arguments(5))
    assert torch.equal(given[0], before[0]) and torch.equal(given[2]["text"], before[2]["text"])


@torch.no_grad()
def test_there_is_one_graph_for_each_kind_of_arguments(graphed_forward, network):
    captures = graphed_forward._capture.pools
    for _ in range(2):
        for batch in (1, 2):
            graphed_forward(*arguments(0, batch))
    assert len(captures) == 2
    for factor in (2.0, 3.0):
        assert torch.equal(graphed_forward(*arguments(0), factor), factor * graphed_forward(*arguments(0)))
    assert len(captures) == 4
    graphed_forward.forget()
    graphed_forward(*arguments(0))
    assert len(captures) == 5
    network.double()
    graphed_forward(*arguments(0, dtype=torch.float64))
    assert len(captures) == 6


@torch.no_grad()
def test_a_deep_copy_has_graphs_of_its_own(network):
    graphed_forward = GraphedForward(network.forward, Recorder(), "cpu")
    x = draw(2, 4)
    before = graphed_forward(x)
    copied = copy.deepcopy(graphed_forward)
    for parameter in copied.__wrapped__.__self__.parameters():
        parameter.mul_(2)
    assert torch.equal(copied(x), copied.__wrapped__(x)) and not torch.equal(copied(x), before)
    assert torch.equal(graphed_forward(x), before)


@torch.no_grad()
def test_an_argument_that_no_graph_is_known_by_is_refused(graphed_forward):
    with pytest.raises(ValueError, match="forward was given a object: a CUDA graph is known by"):
        graphed_forward(*arguments(0), object())


def test_what_inference_mode_recorded_is_not_written_outside_of_it(graphed_forward):
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            assert torch.equal(graphed_forward(*arguments(1)), graphed_forward.__wrapped__(*arguments(1)))


@torch.no_grad()
def test_weights_that_change_in_place_are_seen(graphed_forward, network):
    first = graphed_forward(*arguments(0))
    network[0].weight.copy_(2 * network[0].weight)
    second = graphed_forward(*arguments(0))
    assert torch.equal(second, graphed_forward.__wrapped__(*arguments(0))) and not torch.equal(first, second)


def test_the_function_itself_runs_with_gradient_under_autocast_and_on_other_devices(graphed_forward):
    assert graphed_forward(*arguments(0)).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        graphed_forward(*arguments(0))
    assert graphed_forward._capture.pools == []
    with torch.no_grad():
        on_cuda = GraphedForward(graphed_forward.__wrapped__, Recorder())
        assert torch.equal(on_cuda(*arguments(0)), graphed_forward(*arguments(0)))
    assert on_cuda._capture.pools == []


@torch.no_grad()
def test_random_numbers_are_refused_and_none_is_lost():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws random numbers \(dropout\), .*: put the network in eval"):
        GraphedForward(nn.Dropout(0.5), Recorder(), "cpu")(torch.ones(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(GraphedForward(nn.Dropout(0.5).eval(), Recorder(), "cpu")(torch.ones(8)), torch.ones(8))


@torch.no_grad()
def test_what_cannot_be_captured_is_told_with_its_cause_and_the_way_out():
    def refuse(forward, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    def velocity(x):
        return x

    with pytest.raises(ValueError, match=r"velocity cannot be captured .*not permitted.*backbone.cuda_graph=false"):
        GraphedForward(velocity, refuse, "cpu")(torch.ones(2))


def test_a_capture_warms_up_on_a_stream_of_its_own_and_takes_the_last_pass_into_the_pool(monkeypatch):
    """On stand-ins for the streams and the graph, which note what happens on which of them."""
    notes = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            notes.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            notes.append("replay")

    @contextmanager
    def block(name):
        notes.append(f"begin {name}")
        yield
        notes.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: block(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, capture_error_mode: block(f"capture into {pool}"))
    replay, output = cuda_graph(lambda: notes.append("forward") or len(notes), "pool 7")
    replay()
    warm = ["side waits for current", "begin side", *["forward"] * WARM_UP, "end side", "current waits for side"]
    assert notes == [*warm, "begin capture into pool 7", "forward", "end capture into pool 7", "replay"]
    assert output == len(warm) + 2  # what the captured pass returned


def test_all_graphs_of_a_function_share_one_pool(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capture = Recorder()
    forward = GraphedForward(torch.sin, capture)
    monkeypatch.setattr(graphed.RngState, "capture", lambda device: None)
    with torch.no_grad():
        for size in (1, 2):
            forward._record([torch.ones(size)], torch.utils._pytree.tree_flatten((1,))[1], torch.device("cpu"))
    assert capture.pools[0] is capture.pools[1] is not None
