"""Results on the meta device that are made anew are those of running the operation, and take the same memory."""

import pytest
import torch
from torch import library, nn

from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.meta_results import MetaResults


def meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, tensor.untyped_storage().nbytes()


@pytest.fixture
def doubled():
    """A new operation, and the list of the shapes on which it has run."""
    runs = []
    with library._scoped_library("meta_results_tests", "FRAGMENT") as new:
        new.define("doubled(Tensor x, Scalar by=2) -> Tensor")
        new.impl("doubled", lambda x, by=2: runs.append(x.shape) or x * by, "Meta")
        new.define("half(Tensor x) -> Tensor")
        new.impl("half", lambda x: torch.cat([x, x])[: len(x)], "Meta")
        yield torch.ops.meta_results_tests.doubled, runs


def test_an_operation_runs_once_for_each_way_to_call_it(doubled):
    double, runs = doubled
    x = meta(3, 4)
    with MetaResults():
        results = [double(x), double(meta(3, 4))]
        for call in ((x, 1), (x, 1.0), (x, True), (x.mT,), (x.half(),)):
            double(*call)
    assert len(runs) == 6  # all but the second
    assert form(results[0]) == form(results[1]) == form(x)
    assert results[0].untyped_storage()._cdata != results[1].untyped_storage()._cdata
    double(x)
    assert len(runs) == 7


def test_a_result_within_larger_memory_holds_all_of_it(doubled):
    with MetaResults():
        results = [torch.ops.meta_results_tests.half(meta(3, 4)) for _ in range(2)]
    assert [result.untyped_storage().nbytes() for result in results] == 2 * [2 * 3 * 4 * 4]


CALLS = {
    "a product of several dimensions": lambda x: x @ meta(8, 5),  # returns a view that it does not announce
    "a permuted sum": lambda x: x.permute(2, 0, 1) + 1,
    "two results": lambda x: x.topk(2),
    "parts of a tensor": lambda x: x.chunk(2, dim=1),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "a norm of many dimensions": lambda x: nn.functional.layer_norm(x, (4, 8)),
    "a mean": lambda x: x.mean(dim=(0, 2), keepdim=True),
    "no tensor at all": lambda x: torch.zeros(3, device="meta"),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_have_the_form_of_those_that_ran(name):
    x = meta(2, 4, 8)
    expected = CALLS[name](x)
    with MetaResults():
        found = [CALLS[name](x) for _ in range(2)]
    for result in found:
        result, wanted = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
        assert list(map(form, result)) == list(map(form, wanted))


def test_views_and_writes_stay_in_the_memory_they_are_of():
    x = meta(4, 6)
    with MetaResults():
        for _ in range(2):
            for shared in (
                x.view(24),
                x.mT,
                x[1],
                x.add_(1),
                x.unsafe_split(2)[1],
                torch.ops.aten._unsafe_view(x, [24]),
            ):
                assert shared.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_a_tensor_that_holds_values_is_computed():
    x = torch.ones(3)
    with MetaResults():
        assert [(x * 2).sum().item(), (x * 3).sum().item(), (x * 2).sum().item()] == [6, 9, 6]


def test_a_step_of_a_network_takes_the_same_bytes():
    def peaks():
        torch.manual_seed(0)
        with torch.device("meta"):
            network = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        with LiveBytes(network.parameters()) as live:
            for _ in range(2):
                y = network(meta(2, 5, 16))
                y.square().mean().backward()
                yield live.alive, live.peak

    expected = list(peaks())
    with MetaResults():
        assert list(peaks()) == expected and expected[0][1] > expected[0][0]
