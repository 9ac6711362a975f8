"""Blocks that come and go, on a stand-in device: weights are copied from CPU to CPU, or meta to meta, and counted."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flowbp_kernels
from flowbp_kernels import offload_blocks
from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.offload import Visits, _Pinned, default_blocks, rebuilt

WIDTH, BLOCKS = 64, 4
NAMES = [f"blocks.{i}" for i in range(BLOCKS)]
BLOCK = 4 * (WIDTH * WIDTH + 2 * WIDTH)  # bytes of what is frozen in a block
REENTRANT = {"never": None, "non-reentrant": False, "reentrant": True}


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.scale * self.dropout(torch.tanh(self.linear(x) + self.shift))


class Network(nn.Module):
    """A frozen layer, and blocks that train a vector each."""

    def __init__(self, checkpointing: str = "non-reentrant", dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.reentrant = REENTRANT[checkpointing]
        self.skip = -1

    def forward(self, x, sigma=None):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i != self.skip:
                x = checkpoint(block, x, use_reentrant=self.reentrant) if self.reentrant is not None else block(x)
        return x

    @property
    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


def network(*arguments, **options) -> Network:
    torch.manual_seed(0)
    return Network(*arguments, **options)


def batch(device="cpu", seed=1):
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def step(module, device="cpu"):
    """Outputs and gradients of two kept graphs, and of a pass without."""
    outputs = [module(batch(device, seed)) for seed in (1, 2)]
    with torch.no_grad():
        outputs.append(module(batch(device)))
    for output in reversed(outputs[:2]):
        output.sin().sum().backward()
    gradients = [p.grad for p in module.trained]
    module.zero_grad()
    return [*outputs, *gradients]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", REENTRANT)
def test_values_and_gradients_have_the_bits_of_a_network_that_stays(checkpointing):
    expected, module = step(network(checkpointing)), network(checkpointing)
    handle = offload_blocks(module, "cpu")
    for _ in range(2):
        assert equal(step(module), expected)
    with torch.inference_mode():
        module(batch())
    assert equal(step(module), expected), "no tensor of inference is left"
    handle.undo()
    assert equal(step(module), expected) and not module._forward_hooks and not module.blocks[0]._forward_hooks
    assert equal(step(copy.deepcopy(module)), expected)


def test_weights_are_at_home_between_passes_and_travel_one_way():
    module = network()
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    offload_blocks(module, "cpu")
    inside = []
    module.blocks[1].linear.register_forward_pre_hook(lambda linear, _: inside.append((linear.weight, linear.bias)))
    step(module)
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert before.keys() == after.keys() == module.state_dict().keys()
    assert all(after[name] is before[name] for name in before)
    weight, bias = inside[0]
    assert torch.equal(weight, before["blocks.1.linear.weight"]) and weight is not before["blocks.1.linear.weight"]
    assert isinstance(bias, nn.Parameter) and not bias.requires_grad


def test_a_weight_with_two_names_is_copied_once_and_stays_one_tensor():
    module = network()
    for block in module.blocks:
        block.again = nn.Linear(WIDTH, WIDTH, bias=False)
        block.again.weight = block.linear.weight = nn.Parameter(block.linear.weight.T, requires_grad=False)
    expected = step(module)
    handle = offload_blocks(module, "cpu")
    with LiveBytes([*module.parameters(), *module.buffers()]) as live:
        before = live.alive
        copies, _ = handle._fetch(handle._visitors[0])
    assert live.peak - before == BLOCK
    (matrix,) = {id(tensor): tensor for tensor in copies if tensor.dim() == 2}.values()
    assert len({id(tensor) for tensor in copies}) == 3 and matrix.stride() == (1, WIDTH)
    assert equal(step(module), expected)


# -- memory ------------------------------------------------------------------------------------------------------------


def most_blocks(work, module) -> tuple[float, float]:
    """In blocks: the most bytes that are alive at once while `work` runs, beside those before it, and what is left."""
    with LiveBytes([*module.parameters(), *module.buffers()]) as live:
        before, live.peak = live.alive, live.alive
        work()
        left = live.alive - before
    return (live.peak - before) / BLOCK, left / BLOCK


@pytest.mark.parametrize("device, home", [("cpu", "cpu"), ("meta", "cpu"), ("meta", "meta")])
def test_two_blocks_are_on_the_device_in_forward_recomputation_and_backward(device, home):
    module = network().to(home)
    offload_blocks(module, device)
    x, outputs = batch(device), []
    with torch.no_grad():
        module(x)  # the order is known
        peak, left = most_blocks(lambda: module(x), module)
        assert 2 <= peak < 2.5 and left < 0.1
    for _ in range(2):  # the first backward passes compare checksums
        outputs.clear()
        peak, left = most_blocks(lambda: outputs.extend(module(x).sum() for _ in range(3)), module)
        assert 2 <= peak < 2.8 and left < 0.8, "graphs keep activations alone"
        peak, left = most_blocks(lambda: [output.backward() for output in outputs], module)
        assert 2 <= peak < 2.5 and left < 0.3, "gradients are left"


def test_without_checkpointing_the_graph_keeps_every_block():
    module = network("never")
    offload_blocks(module, "cpu")
    peak, _ = most_blocks(lambda: module(batch()), module)
    assert peak > BLOCKS


@pytest.fixture
def fetched(monkeypatch):
    """The names of the blocks that were copied, in order."""
    names, fetch = [], Visits._fetch
    monkeypatch.setattr(Visits, "_fetch", lambda self, who: (names.append(who.name), fetch(self, who))[1])
    return names


def test_every_block_is_copied_once_a_pass_and_once_more_in_its_backward(fetched):
    module = network()
    handle = offload_blocks(module, "cpu")
    with torch.no_grad():
        for _ in range(2):
            module(batch())
    assert fetched == 2 * NAMES, "and nothing waits for a third pass"
    output = module(batch())
    assert fetched == 3 * NAMES
    output.sum().backward()
    assert fetched == 3 * NAMES + NAMES[::-1] and handle._ahead is None


# -- which blocks, and where the rest goes -----------------------------------------------------------------------------


def test_blocks_are_the_elements_of_the_outermost_lists():
    def leaf():
        return nn.ModuleList([nn.Linear(1, 1)])

    block = nn.Sequential(leaf(), nn.Linear(1, 1))
    nested = nn.ModuleList([nn.ModuleList([block]), nn.ModuleDict({"in": leaf()})])
    module = nn.ModuleDict({"encoder": nn.ModuleDict({"block": nested}), "head": nn.Linear(1, 1)})
    assert list(default_blocks(module)) == [block, nested[1]["in"][0]]
    assert list(default_blocks(block)) == [block[0][0]]


def test_blocks_can_be_named():
    module = network()
    expected = step(module)
    handle = offload_blocks(module, "cpu", blocks=[module.blocks[2], module.first])
    assert equal(step(module), expected) and [v.name for v in handle.order] == ["first", "blocks.2"]


def test_moving_the_module_leaves_frozen_weights_of_blocks_at_home():
    module = network()
    offload_blocks(module, "meta")
    module.to("meta")
    devices = {name: tensor.device.type for name, tensor in module.state_dict().items()}
    at_home = {name for name, device in devices.items() if device == "cpu"}
    assert at_home == {
        f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("linear.weight", "linear.bias", "shift")
    }
    assert module(batch("meta")).device.type == "meta"


# -- the check of recomputations ---------------------------------------------------------------------------------------


def corrupted(module, number):
    with torch.no_grad():
        module.blocks[number].linear.weight[5, 7] += 1e-4


def test_a_recomputation_on_other_weights_raises_and_names_the_block():
    module = network()
    offload_blocks(module, "cpu")
    output = module(batch())
    corrupted(module, 2)
    with pytest.raises(RuntimeError, match=r"recomputation of blocks\.2 in backward gave other bits"):
        output.sum().backward()


def test_the_check_takes_the_first_backward_passes_up_to_the_next_forward_pass():
    module = network()
    offload_blocks(module, "cpu")
    outputs = [module(batch(seed=seed)) for seed in range(3)]
    for output in outputs[:2]:
        output.sum().backward()
    corrupted(module, 1)
    with pytest.raises(RuntimeError, match=r"blocks\.1"):
        outputs[2].sum().backward()
    output = module(batch())
    corrupted(module, 1)
    output.sum().backward()


def test_dropout_passes_the_check():
    plain, module = network(dropout=0.5), network(dropout=0.5)
    offload_blocks(module, "cpu")
    results = []
    for each in (plain, module):
        torch.manual_seed(3)
        results.append(step(each))
    assert equal(*results)


def test_a_forward_pass_within_backward_is_no_recomputation(fetched):
    """selective_recompute replays the network there. Blocks are fetched in the order of that pass, and none in vain."""
    results = []
    for module in (network(), network()):
        if results:
            handle = offload_blocks(module, "cpu")
        nodes = [batch(seed=seed).detach() for seed in range(3)]
        value = flowbp_kernels.selective_recompute(
            nodes[0], module, nodes, [1.0, 0.6, 0.2], [0.3, 0.5, 0.2], (1, 0.5), params=module.trained
        )
        value.sin().sum().backward()
        results.append([p.grad for p in module.trained])
    assert equal(*results) and handle._compared
    assert fetched == 3 * (NAMES + NAMES[::-1])


# -- the order of streams ----------------------------------------------------------------------------------------------


class Late(TorchDispatchMode):
    """Copies that are launched here are made when a stream waits for them. Until then their memory holds NaN."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.copy_.default and self.stream.in_order
        args[0].fill_(torch.nan)
        self.stream.launched.append(args[:2])
        return args[0]


class Stream:
    """A side stream that lags behind: nothing happens on it before somebody waits."""

    def __init__(self):
        self.launched, self.in_order, self.events = [], False, []

    def wait_stream(self, other):
        self.in_order = True  # memory that the computation used before may be written from here on

    def record_event(self):
        self.in_order = False
        self.events.append(self.launched)
        self.launched = []
        return self.events[-1]

    def wait_event(self, event):
        self.events = [other for other in self.events if other is not event]
        for target, source in event:
            target.copy_(source)


def test_no_block_computes_on_a_copy_that_is_not_done(monkeypatch):
    """And no memory is given away that a copy still writes to, where a block is fetched and then skipped."""
    side = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", Late)
    expected, module = network(), network()
    handle = offload_blocks(module, "cpu")
    handle.side = side
    for skip in (-1, 2, -1):
        expected.skip = module.skip = skip
        if skip == -1:
            assert equal(step(module), step(expected))
        else:
            with torch.no_grad():
                assert torch.equal(module(batch()), expected(batch()))
        assert not side.events and handle._ahead is None


def test_a_gpu_computes_the_same_bits_from_pinned_memory_with_two_blocks_in_its_own(gpu):
    plain, module = network().cuda(), network()
    expected = step(plain, "cuda")
    handle = offload_blocks(module, "cuda")
    assert all(home.is_pinned() for visitor in handle._visitors for _, _, home in visitor.homes)
    for _ in range(50):
        assert equal(step(module, "cuda"), expected)
    x, before = batch("cuda"), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        module(x)
    assert 2 <= (torch.cuda.max_memory_allocated() - before) / BLOCK < 2.8


def test_pinned_memory_comes_in_pieces_that_keep_values_and_strides(monkeypatch):
    monkeypatch.setattr("flowbp_kernels.offload.PINNED", 1024)
    pinned = _Pinned(pin=False)
    tensors = [torch.randn(3), torch.randn(7, 5).T, torch.arange(9, dtype=torch.uint8), torch.randn(17, 31).bfloat16()]
    tensors += [torch.randn(6).expand(4, 6), torch.tensor(3), torch.empty(0)]
    copies = [pinned(tensor) for tensor in tensors]
    assert equal(copies, tensors) and copies[1].stride() == (1, 5)
    assert len({tensor.untyped_storage().data_ptr() for tensor in copies}) == 3


# -- other tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes", "bitsandbytes, nested"])
def test_quantised_weights_visit(kind):
    modules = [network(), network()]
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        for module in modules:
            quantization.quantize_(module, quantization.Int8WeightOnlyConfig(version=2))
    else:
        linear = pytest.importorskip("bitsandbytes").nn.Linear4bit
        for module in modules:
            for block in module.blocks:
                options = {"compress_statistics": "nested" in kind, "quant_type": "nf4"}
                layer = linear(WIDTH, WIDTH, compute_dtype=torch.float32, **options)
                layer.load_state_dict(block.linear.state_dict())
                block.linear = layer.requires_grad_(False).to("cpu")
    plain, module = modules
    expected = step(plain)
    handle = offload_blocks(module, "cpu")
    assert equal(step(module), expected)
    home, copies = module.blocks[0].linear.weight, handle._fetch(handle._visitors[0])[0]
    (copied,) = [tensor for tensor in copies if type(tensor) is type(home)]
    assert len(places(home)) == len(places(copied)) > 1 and not places(home) & places(copied)
    if kind == "bitsandbytes, nested":
        assert copied.quant_state.state2.absmax.data_ptr() != home.quant_state.state2.absmax.data_ptr()
    handle.undo()
    assert equal(step(module), expected)


def places(tensor) -> set[int]:
    """Where the parts of a quantised tensor lie."""
    found = set()
    rebuilt(tensor, lambda part: found.add(part.untyped_storage().data_ptr()) or part)
    return found


# -- what is refused ---------------------------------------------------------------------------------------------------


@contextmanager
def refused(match):
    with pytest.raises(ValueError, match=match):
        yield


def test_what_cannot_visit_is_refused_and_changes_nothing():
    module = network()
    with refused("Linear has no nn.ModuleList: name the modules"):
        offload_blocks(nn.Linear(1, 1), "cpu")
    with refused(r"blocks\.0\.linear \(Linear\) is named twice, or lies in another"):
        offload_blocks(module, "cpu", blocks=[module.blocks[0], module.blocks[0].linear])
    with refused(r"no weight in the 4 blocks of Network is frozen"):
        offload_blocks(network().requires_grad_(True), "cpu", blocks=[nn.Linear(1, 1) for _ in range(4)])
    compiled = network()
    compiled.blocks[1].compile(backend="eager")
    with refused(r"blocks\.1 \(Block\) is compiled"):
        offload_blocks(compiled, "cpu")
    eight_bits = network()
    kind = type("Int8Params", (nn.Parameter,), {})
    eight_bits.blocks[3].linear.weight = kind(torch.ones(WIDTH, WIDTH), requires_grad=False)
    with refused(r"blocks\.3 \(Block\): the 8-bit layers of bitsandbytes"):
        offload_blocks(eight_bits, "cpu")
    for each in (module, compiled, eight_bits):
        assert not any(part._forward_hooks or "_apply" in vars(part) for part in each.modules())


def test_a_call_that_was_interrupted_leaves_nothing_behind():
    plain, visiting = network(), network()
    handle = offload_blocks(visiting, "cpu")
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))

    def interrupt(*_):
        raise KeyboardInterrupt  # for which PyTorch runs no forward hook

    hook = visiting.blocks[2].linear.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        visiting(x)
    hook.remove()
    visiting(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(visiting.trained, plain.trained, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    handle.undo()
    y = visiting(x)
    with torch.no_grad():
        visiting.blocks[1].linear.weight.add_(1)
    assert not torch.equal(visiting(x), y)  # the weights that were at home are the module's own


def test_a_weight_that_was_replaced_is_refused():
    visiting = network()
    offload_blocks(visiting, "cpu")
    visiting.blocks[1].linear.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    with pytest.raises(ValueError, match="a weight of blocks.1 was replaced"):
        visiting(torch.ones(2, WIDTH))


def test_what_an_offloaded_module_cannot_do_is_refused():
    module = network()
    handle = offload_blocks(module, "cpu")
    with refused(r"blocks\.0 \(Block\) is offloaded already"):
        offload_blocks(module, "cpu")
    with refused(r"blocks\.0 are offloaded and stay torch.float32, not torch.bfloat16"):
        module.blocks.to(torch.bfloat16)
    with refused("cannot be copied or pickled"):
        copy.deepcopy(module)
    module.blocks[1].linear.requires_grad_(True)
    with refused(r"a weight of blocks\.1 was frozen"):
        module(batch())
    handle.undo()
    module.to(torch.bfloat16)
