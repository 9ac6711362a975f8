"""The fused ops in the blocks of diffusers: the values and gradients of diffusers and peft, in place and reversibly."""

import copy
import functools
import io
from functools import cache

import pytest
import torch
import torch.distributed as dist
import yaml
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from tiny_pipelines import tiny_pipeline
from torch import nn

import flowbp_kernels
from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.config import load
from flowbp.config.schema import BackboneConfig
from flowbp.evaluation.scores import generate
from flowbp.guidance import Guidance
from flowbp.runtime.data import load_prompts
from flowbp.shapes.checker import load_checker
from flowbp_kernels import selective_recompute
from flowbp_kernels.blocks import fingerprints, fused, table

SD3, FLUX, FLUX2, ZIMAGE = BACKBONES
MODES = ["lora", "full"]
of_each_class = pytest.mark.parametrize("name", BACKBONES)


@pytest.fixture(autouse=True)
def all_ops_run(monkeypatch):
    """On a CPU that has no kernel of an op, its reference stands in for the kernel."""
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")


@cache
def pristine(name):
    """A backbone, and what its transformer is called with."""
    backbone, calls = BACKBONES[name](tiny_pipeline(name), "float32", 48), []
    hook = backbone.denoiser.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    noise = backbone.noise(64, 64, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    guidance = Guidance(embedded=4.0 if backbone.embeds_guidance else None)  # its 4000 is a number of bfloat16
    velocity = bind_velocity(backbone, ["a red circle", "two blue stars"], guidance)
    with torch.no_grad():
        velocity(noise, torch.tensor(0.5))
    hook.remove()
    return backbone, calls[0]


def network(name, mode="lora", **lora):
    """Its own copy of the transformer, every parameter of which matters."""
    backbone, _ = pristine(name)
    net = copy.deepcopy(backbone.denoiser)
    return add_lora(name, net, **lora) if mode == "lora" else net.requires_grad_(True)


def add_lora(name, net, adapter="default", **lora):
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=6, target_modules=pristine(name)[0].lora_targets)
    net.add_adapter(LoraConfig(**options | lora), adapter_name=adapter)
    for key, p in net.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, std=0.1)
    return net


def cast(value, dtype):
    """What a network is called with, in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype.is_floating_point else value
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, dtype) for v in value)
    return {key: cast(v, dtype) for key, v in value.items()} if isinstance(value, dict) else value


def called(name, net, dtype=torch.float32):
    _, (args, kwargs) = pristine(name)
    y = net(*cast(args, dtype), **cast(kwargs, dtype))[0]
    return torch.stack(list(y)) if isinstance(y, list) else y  # Z-Image returns a list


def outcome(name, net, dtype=torch.float32):
    """The output and the gradient of every trained parameter, by name."""
    y = called(name, net, dtype)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, list(trained.values()), seed, allow_unused=True)
    return {"output": y.detach()} | {k: g for k, g in zip(trained, gradients, strict=True) if g is not None}


@cache
def of_diffusers(name, mode="lora"):
    return outcome(name, network(name, mode))


def assert_close(ours, theirs, bound=1e-5):
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key] - expected).norm() <= bound * expected.norm(), key


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@of_each_class
def test_values_and_gradients_are_those_of_diffusers(name, mode):
    net = network(name, mode)
    flowbp_kernels.apply(net)
    assert_close(outcome(name, net), of_diffusers(name, mode))


@pytest.mark.parametrize("mode", MODES)
@of_each_class
def test_without_ops_every_bit_is_that_of_diffusers(name, mode):
    """The forwards are re-stated exactly: what differs with ops is the rounding of the ops."""
    net = network(name, mode)
    flowbp_kernels.apply(net, ops=())
    assert_equal(outcome(name, net), of_diffusers(name, mode))


OPS = {
    "lora": ["lora_linear"],
    "modulation": ["modulated_layer_norm", "modulated_rms_norm", "gated_residual", "gated_residual_layer_norm"],
    "qk_norm": ["qk_norm"],
    "activations": ["gelu", "swiglu"],
}


@pytest.mark.parametrize("family", fused.FAMILIES)
@of_each_class
def test_each_family_of_ops_can_run_alone(name, family, monkeypatch):
    called = set()
    for other, ops in OPS.items():
        for op in ops:
            run = getattr(fused, op)
            spy = lambda *a, other=other, run=run, **k: called.add(other) or run(*a, **k)  # noqa: E731
            monkeypatch.setattr(fused, op, spy)
    net = network(name)
    flowbp_kernels.apply(net, family)
    assert_close(outcome(name, net), of_diffusers(name))
    assert called == {family}


@of_each_class
def test_a_cpu_without_kernels_runs_all_but_lora_as_diffusers_does(name, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    monkeypatch.setattr(fused, "_has_kernel", lambda op, device_type: False)
    net = network(name, "full")
    handle = flowbp_kernels.apply(net)
    assert_equal(outcome(name, net), of_diffusers(name, "full"))
    assert [f"{family}: no kernel for cpu" for family in ("activations", "modulation", "qk_norm")] == handle.left


@of_each_class
def test_the_kernels_that_this_machine_has_give_the_same_numbers(name, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    net = network(name)
    flowbp_kernels.apply(net)
    assert_close(outcome(name, net), of_diffusers(name))


def error(ours, exact):
    """Root mean square over the output and the gradients of their relative errors, each in its norm. All of them
    together, because the error of one small tensor is a matter of a few roundings. What is exactly 0 stays 0.
    """
    gaps = [(ours[key].double() - g).norm() / (g.norm() or 1) for key, g in exact.items()]
    return torch.stack(gaps).square().mean().sqrt()


@pytest.mark.parametrize("mode", MODES)
@of_each_class
def test_in_bfloat16_the_error_is_at_most_twice_that_of_diffusers(name, mode):
    net = network(name, mode).bfloat16()
    for key, p in net.named_parameters():
        if "lora" in key:
            p.data = p.data.float()
    exact = outcome(name, copy.deepcopy(net).double(), torch.float64)
    theirs = outcome(name, net, torch.bfloat16)
    flowbp_kernels.apply(net)
    ours = outcome(name, net, torch.bfloat16)
    assert {key: g.dtype for key, g in ours.items()} == {key: g.dtype for key, g in theirs.items()}
    assert 0 < error(ours, exact) <= 2 * error(theirs, exact)


@of_each_class
def test_under_autocast_the_error_is_at_most_twice_that_of_diffusers(name):
    net, exact = network(name), of_diffusers(name)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = outcome(name, net)
        flowbp_kernels.apply(net)
        ours = outcome(name, net)
    assert ours["output"].dtype == theirs["output"].dtype
    assert 0 < error(ours, exact) <= 2 * error(theirs, exact)


@of_each_class
def test_undo_restores_every_bit(name):
    net = network(name)
    handle = flowbp_kernels.apply(net)
    outcome(name, net)
    handle.undo()
    handle.undo()
    assert_equal(outcome(name, net), of_diffusers(name))
    assert not any({"forward", "flowbp_fused"} & vars(module).keys() for module in net.modules())


def test_sd3_without_norms_of_queries_and_keys():
    """SD3-medium."""
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=32,
    )  # fmt: skip
    theirs = outcome(SD3, net)
    handle = flowbp_kernels.apply(net)
    assert_close(outcome(SD3, net), theirs)
    assert handle.left == ["qk_norm: 2 attentions do not normalise queries and keys"]


# -- with what else runs a transformer ---------------------------------------------------------------------------------


@of_each_class
def test_adapters_may_come_before_or_after(name):
    before, after = network(name), copy.deepcopy(pristine(name)[0].denoiser)
    flowbp_kernels.apply(before)
    flowbp_kernels.apply(after)
    assert_equal(outcome(name, add_lora(name, after)), outcome(name, before))


def reloaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@of_each_class
@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_a_copy_runs_the_ops_on_weights_of_its_own(name, copied):
    net = network(name)
    flowbp_kernels.apply(net)
    expected, twin = outcome(name, net), copied(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert_equal(outcome(name, twin), expected)


def compiled(net):
    torch._dynamo.reset()
    net._repeated_blocks = [kind.__name__ for kind in table.BLOCKS]  # diffusers names them for every class but SD3
    net.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    return net


@of_each_class
def test_blocks_compiled_in_place_run_the_ops(name):
    net, eager = compiled(network(name)), network(name)
    flowbp_kernels.apply(net)
    flowbp_kernels.apply(eager)
    assert_close(outcome(name, net), outcome(name, eager), 1e-6)


def test_a_graph_follows_apply_and_undo():
    net = compiled(network(FLUX2))
    assert_close(outcome(FLUX2, net), of_diffusers(FLUX2), 1e-6)
    handle = flowbp_kernels.apply(net)
    fused_outcome = outcome(FLUX2, net)
    assert any(not torch.equal(fused_outcome[key], g) for key, g in of_diffusers(FLUX2).items())
    assert_close(fused_outcome, of_diffusers(FLUX2))
    handle.undo()
    assert_close(outcome(FLUX2, net), of_diffusers(FLUX2), 1e-6)


@of_each_class
def test_gradient_checkpointing_changes_no_bit(name):
    net = network(name)
    flowbp_kernels.apply(net)
    expected = outcome(name, net)
    net.enable_gradient_checkpointing()
    assert_equal(outcome(name, net), expected)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", [SD3, FLUX2])
def test_blocks_may_be_sharded(name, order, one_process, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, calls = network(name), []
    handle = flowbp_kernels.apply(net) if order == "before" else None
    for module in [*net.modules()]:
        if type(module) in table.BLOCKS:
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    handle = handle or flowbp_kernels.apply(net)
    op = fused.lora_linear
    monkeypatch.setattr(fused, "lora_linear", lambda *call: calls.append(call) or op(*call))
    y = called(name, net)
    assert len(calls) == sum(hasattr(module, "lora_A") for module in net.modules())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    ours = {key: p.grad.full_tensor() for key, p in net.named_parameters() if p.requires_grad}
    assert_close({"output": y.detach()} | ours, of_diffusers(name))
    assert handle.left == []


def test_selective_recompute_replays_the_ops():
    def gradients(net):
        latents = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        args, kwargs = pristine(SD3)[1]
        rest = {key: value for key, value in kwargs.items() if key not in ("hidden_states", "timestep")}

        def velocity(x, sigma):
            return net(*args, hidden_states=x, timestep=torch.full((2,), 1000 * sigma), **rest)[0]

        params = [p for p in net.parameters() if p.requires_grad]
        weights = [-0.5, -0.3, -0.2]
        z = selective_recompute(latents[-1], velocity, latents, [1.0, 0.5, 0.2], weights, (1, 0.3), params=params)
        z.square().sum().backward()
        return {str(i): p.grad for i, p in enumerate(params)}

    net, plain = network(SD3), network(SD3)
    flowbp_kernels.apply(net)
    assert_close(gradients(net), gradients(plain))


# -- what runs as diffusers and peft run it ----------------------------------------------------------------------------


def two_adapters(net):
    add_lora(SD3, net, "second")
    net.set_adapters(["default", "second"])


def hooked(net):
    for module in net.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda module, args, out: out * 1.5)


def narrow_with_hooks(net):
    for module in net.modules():
        if hasattr(module, "lora_A"):
            module.lora_B["default"].register_forward_hook(lambda module, args, out: out * 1.5)


OBSTACLES = {
    "dropout": ({"lora_dropout": 0.1}, lambda net: net.eval(), "dropout"),
    "DoRA": ({"use_dora": True}, lambda net: None, "DoraLinearVariant"),
    "bias": ({"lora_bias": True}, lambda net: None, "lora_bias"),
    "two adapters": ({}, two_adapters, "2 active adapters"),
    "merged": ({}, lambda net: net.fuse_lora(), "adapters merged or disabled"),
    "disabled": ({}, lambda net: net.disable_adapters(), "adapters merged or disabled"),
    "hooks": ({}, hooked, "hooks"),
    "hooks within": ({}, narrow_with_hooks, "lora_A or lora_B is a Linear, or has hooks"),
}


@pytest.mark.parametrize(("lora", "change", "why"), OBSTACLES.values(), ids=OBSTACLES)
def test_peft_runs_the_adapters_that_lora_linear_does_not_take(lora, change, why):
    ours, theirs = network(SD3, **lora), network(SD3, **lora)
    handle = flowbp_kernels.apply(ours, "lora")
    change(ours)
    change(theirs)
    assert_equal({"output": called(SD3, ours)}, {"output": called(SD3, theirs)})
    assert handle.left[-1] == f"{sum(hasattr(m, 'lora_A') for m in ours.modules())} LoRA layers: {why}"


class Rounded(nn.Linear):
    """As a quantised layer: its weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.mul(64).round().div(64), self.bias)


def test_a_layer_that_is_no_plain_linear_layer_is_called_beneath_its_adapter():
    ours = copy.deepcopy(pristine(FLUX)[0].denoiser)
    for module in ours.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounded
    theirs = copy.deepcopy(ours)
    flowbp_kernels.apply(ours)
    assert_close(outcome(FLUX, add_lora(FLUX, ours)), outcome(FLUX, add_lora(FLUX, theirs)))


@of_each_class
def test_the_scale_of_the_adapters_is_that_of_the_call(name):
    ours, theirs = network(name), network(name)
    flowbp_kernels.apply(ours)
    args, kwargs = pristine(name)[1]
    scaled = {"joint_attention_kwargs": {"scale": 0.25}}
    y, expected = (net(*args, **kwargs | scaled)[0] for net in (ours, theirs))
    y, expected = (torch.stack(list(t)) for t in (y, expected))
    assert_close({"output": y}, {"output": expected})
    assert (expected - of_diffusers(name)["output"]).norm() > 1e-2 * expected.norm()


@of_each_class
def test_every_hook_runs_that_runs_without_the_ops(name):
    """Of every module, those within a block too."""

    def hooked(net):
        seen = []
        for key, module in net.named_modules():
            module.register_forward_hook(lambda module, args, out, key=key: seen.append(key))
        called(name, net)
        return sorted(seen)

    net = network(name, "full")
    flowbp_kernels.apply(net)
    assert hooked(net) == hooked(network(name, "full"))


def fused_projections(net):
    net.fuse_qkv_projections()


def chunked(net):
    net.enable_forward_chunking(chunk_size=1, dim=0)


class Halved(JointAttnProcessor2_0):
    """A processor that no function re-states."""

    def __call__(self, *args, **kwargs):
        return [y / 2 for y in torch.atleast_1d(*super().__call__(*args, **kwargs))]


def other_processor(net):
    for module in net.modules():
        if hasattr(module, "added_kv_proj_dim") and module.added_kv_proj_dim:
            module.set_processor(Halved())


CHANGES = {
    "qkv in one, FLUX.1": (FLUX, fused_projections),
    "qkv in one, FLUX.2": (FLUX2, fused_projections),
    "chunked feed forward": (SD3, chunked),
    "another processor": (SD3, other_processor),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_diffusers_after_apply_takes_effect(name, change):
    ours, theirs = (copy.deepcopy(pristine(name)[0].denoiser).requires_grad_(True) for _ in range(2))
    flowbp_kernels.apply(ours)
    for net in (ours, theirs):
        change(net)
    assert_close(outcome(name, ours), outcome(name, theirs))


def test_modulation_by_token_runs_as_diffusers_runs_it():
    """Z-Image's omni mode, and FLUX.2 beside kept keys and values."""
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    net = network(ZIMAGE, "full")
    block, (table, _) = net.layers[0], (torch.polar(torch.ones(2, 6, 8), draw(2, 6, 8)), None)
    options = dict(attn_mask=None, freqs_cis=table, noise_mask=torch.tensor([[0, 1, 1, 0, 1, 0]] * 2))
    options |= {"adaln_noisy": draw(2, 32), "adaln_clean": draw(2, 32) / 2}
    expected = block(draw(2, 6, 32), **options)
    flowbp_kernels.apply(net)
    torch.testing.assert_close(block(draw(2, 6, 32), **options), expected, rtol=1e-5, atol=1e-5)

    net = network(FLUX2, "full")
    block, rope = net.single_transformer_blocks[0], (draw(6, 16).cos(), draw(6, 16).sin())
    expected = block(draw(2, 6, 32), None, draw(2, 6, 96), rope)
    flowbp_kernels.apply(net)
    torch.testing.assert_close(block(draw(2, 6, 32), None, draw(2, 6, 96), rope), expected, rtol=1e-5, atol=1e-5)


# -- what is refused, and what is said ---------------------------------------------------------------------------------


FUNCTIONS = {*table.BLOCKS.values(), *table.LAYERS.values(), *table.ATTENTIONS.values(), fused.Fused.project}
FUNCTIONS = {f"{function.__module__}.{function.__name__}": function for function in FUNCTIONS}


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_the_installed_source_is_the_one_that_was_re_stated(function):
    stale = fingerprints.changed(FUNCTIONS[function])
    assert not stale, f"read {stale} again, re-state in {function} what changed, and update the fingerprint there"


def test_a_fingerprint_is_of_the_tokens():
    def function(a):
        return a + 1

    first = fingerprints.fingerprint(function)

    def function(a):  # a comment
        # and another

        return (a
                + 1) if a else a  # fmt: skip

    second = fingerprints.fingerprint(function)

    def function(a):
        return a  +  1  # fmt: skip

    assert fingerprints.fingerprint(function) == first != second


def test_a_changed_source_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(fingerprints, "fingerprint", lambda source: "0")
    net = network(SD3)
    with pytest.raises(ValueError, match="JointTransformerBlock.forward of diffusers .*: its source is not the one"):
        flowbp_kernels.apply(net)
    assert not any("forward" in vars(module) for module in net.modules())


class OwnForward(AdaLayerNormContinuous):
    def forward(self, x, conditioning_embedding):
        return x


class OwnBlock(nn.Sequential):
    pass


def with_ip_adapter(net):
    net.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))


def with_own_forward(net):
    net.norm_out.__class__ = OwnForward


def with_own_block(net):
    net.transformer_blocks.append(OwnBlock(nn.Linear(2, 2)))


def with_patched_forward(net):
    block = net.transformer_blocks[0]
    block.forward = functools.partial(block.forward)


REFUSALS = {
    "IP-adapter": (with_ip_adapter, "transformer_blocks.0.attn has the attention processor FluxIPAdapterAttnProcessor"),
    "forward": (with_own_forward, "norm_out, a OwnForward, has another forward than AdaLayerNormContinuous"),
    "block": (with_own_block, "transformer_blocks.1 is a OwnBlock, which is no block that is known; known are Joint"),
    "patched": (with_patched_forward, r"transformer_blocks.0 \(FluxTransformerBlock\) was replaced by FluxTransf"),
    "twice": (flowbp_kernels.apply, "applied to this transformer already: call undo"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_known_is_refused_by_name(change, message):
    net = network(FLUX)
    change(net)
    with pytest.raises(ValueError, match=message):
        flowbp_kernels.apply(net)


def test_other_input_is_refused():
    with pytest.raises(ValueError, match=r"unknown ops \['rope'\]; there are lora, modulation, qk_norm, activations"):
        flowbp_kernels.apply(network(SD3), ["lora", "rope"])
    with pytest.raises(ValueError, match="Linear has no block that is known; known are JointTransformerBlock, Flux"):
        flowbp_kernels.apply(nn.Linear(2, 2))


def test_undo_leaves_what_was_put_over_the_ops_since():
    net = network(SD3)
    handle = flowbp_kernels.apply(net)
    with_patched_forward(net)
    with pytest.raises(ValueError, match="the forward of JointTransformerBlock was replaced after"):
        handle.undo()
    assert_close(outcome(SD3, net), of_diffusers(SD3))


def test_the_handle_says_what_runs_fused_and_what_does_not():
    handle = flowbp_kernels.apply(network(FLUX2), ["lora", "modulation"])
    assert repr(handle) == (
        "<Flux2Transformer2DModel runs fused: 1 Flux2TransformerBlock, 1 Flux2Attention, 2 Flux2FeedForward, "
        "2 Flux2SingleTransformerBlock, 2 Flux2ParallelSelfAttention, 1 AdaLayerNormContinuous; "
        "left: qk_norm: not named in ops; activations: not named in ops>"
    )
    handle.undo()
    assert repr(handle).startswith("<Flux2Transformer2DModel runs fused: nothing; left: ")
    handle = flowbp_kernels.apply(network(SD3, target_modules=["to_q", "context_embedder"]))
    assert handle.left == ["1 LoRA layers: called by modules that are left"]
    in_a_sequential = r"layers\.\d+\.(adaLN_modulation\.0|attention\.to_q)"
    handle = flowbp_kernels.apply(network(ZIMAGE, target_modules=in_a_sequential))
    assert handle.left == ["2 LoRA layers: called by modules that are left"]


# -- the switch of a run -----------------------------------------------------------------------------------------------


def runs_ops(backbone):
    return any("flowbp_fused" in vars(module) for module in backbone.denoiser.modules())


def test_a_backbone_takes_the_ops_if_it_is_told_to(default_kernels, monkeypatch, caplog):
    assert runs_ops(load_backbone("shapes")) == (default_kernels == "auto")
    assert not runs_ops(load_backbone("shapes", kernels="off"))
    assert runs_ops(load_backbone("shapes", kernels="auto"))
    monkeypatch.setattr(fingerprints, "fingerprint", lambda source: "0")
    assert not runs_ops(load_backbone("shapes", kernels="auto"))
    assert "the transformer stays as it is: " in caplog.text


def test_the_embedded_model_draws_with_the_ops_what_it_draws_without_and_the_checker_sees_no_difference(monkeypatch):
    """Of 16 images some show their captions."""
    monkeypatch.setenv("FLOWBP_KERNELS", "auto")
    texts, config = [prompt.text for prompt in load_prompts("shapes:test")[:16]], load("demo")
    with_ops, without = (
        generate(backbone, texts, range(16), config.rollout, config.guidance)
        for backbone in (load_backbone("shapes", max_sequence_length=1, kernels=kernels) for kernels in ("auto", "off"))
    )
    assert (with_ops - without).abs().max() <= 1e-4
    verdicts = [load_checker(texts)(images, texts).tolist() for images in (with_ops, without)]
    assert verdicts[0] == verdicts[1] and 0 < sum(verdicts[0]) < 16


def test_off_is_the_default_and_the_word_for_what_yaml_makes_of_it(default_kernels):
    assert BackboneConfig(name="shapes").kernels == default_kernels  # off, unless conftest.py says otherwise
    assert BackboneConfig(**yaml.safe_load("{name: shapes, kernels: off}")).kernels == "off"
    assert BackboneConfig(name="shapes", kernels="auto").kernels == "auto"
    with pytest.raises(ValueError, match="kernels"):
        BackboneConfig(name="shapes", kernels=True)
