"""`backbone.attention`: which attention kernel a transformer runs, in forward, in backward and nowhere else."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import constants
from tiny_pipelines import tiny_pipeline
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.config import load
from flowbp.guidance import Guidance
from flowbp.runtime.memory import compile_blocks
from flowbp.runtime.tuned_model import frozen_backbone
from flowbp.training.trainer import Trainer
from flowbp_kernels import apply, attention
from flowbp_kernels.attention import CUDNN_FIRST, check_attention, prefers_cudnn, set_attention, try_attention

SD3 = "StableDiffusion3Pipeline"
of_each_class = pytest.mark.parametrize("name", BACKBONES)


def attentions(backbone):
    return [module for module in backbone.denoiser.modules() if hasattr(module, "processor")]


def build(name, choice=None, kernels=False):
    backbone = BACKBONES[name](tiny_pipeline(name), "float32", 48)
    if kernels:
        apply(backbone.denoiser)
    if choice is not None:
        set_attention(backbone.denoiser, choice)
    return backbone


def pass_of(backbone, seen=None):
    """A velocity and the gradient of its square in the latents. `seen` is then of the transformer alone."""
    x = backbone.noise(64, 64, [torch.Generator().manual_seed(0)]).requires_grad_()
    guidance = Guidance(embedded=3.5 if backbone.embeds_guidance else None)
    velocity = bind_velocity(backbone, ["a red circle"], guidance)
    if seen is not None:  # the text encoders have attended
        assert all(kernels == _cur_sdpa_kernel_backends(with_priority=True) for kernels in seen)
        seen.clear()
    v = velocity(x, torch.tensor(0.5))
    return v.detach(), *torch.autograd.grad(v.square().sum(), x)


@pytest.fixture
def on_9_0(monkeypatch):
    """As if this machine had a GPU of capability 9.0 with a new cuDNN."""
    monkeypatch.setattr(attention, "prefers_cudnn", lambda: True)
    monkeypatch.setattr(attention, "settle_order", lambda: None)


@pytest.fixture
def seen(monkeypatch):
    """The kernels that each attention may take, in their order."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments, **options):
        calls.append(_cur_sdpa_kernel_backends(with_priority=True))
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return calls


@of_each_class
def test_auto_and_native_change_no_bit_without_such_a_gpu(name):
    expected = pass_of(build(name))
    for choice in ("auto", "native"):
        backbone = build(name, choice)
        assert not any("forward" in vars(module) for module in attentions(backbone))
        assert all(map(torch.equal, pass_of(backbone), expected))


@pytest.mark.parametrize("kernels", [False, True])
@of_each_class
def test_cudnn_comes_first_in_forward_and_when_checkpointing_computes_again(name, kernels, on_9_0, seen):
    before = _cur_sdpa_kernel_backends(with_priority=True)
    backbone = build(name, "auto", kernels)
    backbone.denoiser.enable_gradient_checkpointing()
    backbone.denoiser.train()
    found = pass_of(backbone, seen)
    assert all(kernels == CUDNN_FIRST for kernels in seen)
    assert len(seen) > 1.5 * len(attentions(backbone))  # once in forward, and once more where x has a gradient
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert all(map(torch.equal, found, pass_of(build(name, kernels=kernels))))


@of_each_class
def test_a_kernel_is_chosen_by_its_name_for_one_transformer_alone(name, seen):
    active, other = _AttentionBackendRegistry.get_active_backend(), build(name)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    pass_of(build(name, "_native_math"), seen)
    assert seen and all(kernels == [SDPBackend.MATH] for kernels in seen)
    seen.clear()
    pass_of(other, seen)
    assert seen and all(kernels == before for kernels in seen)
    assert _AttentionBackendRegistry.get_active_backend() == active


def test_native_is_pytorchs_choice_whatever_diffusers_default_is(monkeypatch, seen):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_MATH)
    pass_of(build("FluxPipeline", "native"), seen)
    assert seen and all(len(kernels) > 1 for kernels in seen)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_later_choice_takes_the_place_of_an_earlier_one(kernels, seen):
    backbone = load_backbone("shapes", max_sequence_length=1)
    handle = apply(backbone.denoiser) if kernels == "auto" else None
    own = [module.__dict__.get("forward") for module in backbone.denoiser.modules()]
    for name in ("_native_math", "_native_efficient", "native"):
        set_attention(backbone.denoiser, name)
    assert [module.__dict__.get("forward") for module in backbone.denoiser.modules()] == own
    if handle is not None:
        handle.undo()


def test_a_deep_copy_attends_with_its_own_weights(on_9_0):
    backbone = build(SD3, "auto")
    expected, own = pass_of(backbone), backbone.pipe.transformer
    backbone.pipe.transformer = copy.deepcopy(own)
    with torch.no_grad():
        for p in own.parameters():
            p.zero_()
    assert all(map(torch.equal, pass_of(backbone), expected))


def test_compiled_blocks_take_the_order_into_their_graphs(on_9_0):
    torch._dynamo.reset()
    backbone, targets = build(SD3, "auto"), []
    expected = pass_of(build(SD3))

    def note(graph, inputs):
        targets.extend(getattr(node.target, "__name__", "") for node in graph.graph.nodes)
        return graph

    compile_blocks(backbone.denoiser, note)
    torch.testing.assert_close(pass_of(backbone), expected)
    assert targets.count("_sdpa_kernel") == 2 * targets.count("scaled_dot_product_attention") > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_kernel_that_is_not_there_is_told_before_any_weight_is_read(monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    for choice, why in (("sage", "is not for .* SD3's"), ("flsh", "is unknown")):
        with pytest.raises(ValueError, match=f"'{choice}' {why}; there are auto, native, _native_cudnn"):
            load_backbone("shapes", attention=choice)
    with pytest.raises(ValueError, match="'flsh' is unknown; there are auto, native, .*flash"):
        check_attention("flsh")
    with pytest.raises(ValueError, match="'xformers' is not to be had here: .*xformers.*; there are auto, native"):
        check_attention("xformers")


@pytest.mark.parametrize(
    "name", [kind.value for kind in AttentionBackendName if kind in attention_dispatch._HUB_KERNELS_REGISTRY]
)
def test_no_name_in_a_config_runs_code_of_the_hub(name, monkeypatch):
    fetched = []
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda kind: None)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", fetched.append)
    with pytest.raises(ValueError, match="is code from the Hub: set DIFFUSERS_TRUST_REMOTE_KERNELS=true"):
        check_attention(name)
    assert not fetched
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    check_attention(name)
    assert fetched == [name]


def test_a_kernel_without_a_gradient_draws_and_does_not_train(monkeypatch):
    """As sageattention, which returns a result without a graph."""

    def without_graph(query, key, value):
        return (query + key + value).detach()

    monkeypatch.setitem(_AttentionBackendRegistry._backends, "sage", without_graph)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, "sage", {"query", "key", "value"})
    try_attention("sage", "cpu", torch.float32, gradient=False)
    with pytest.raises(ValueError, match="'sage' gives no gradient to train with on cpu in float32 .*: take auto"):
        try_attention("sage", "cpu", torch.float32, gradient=True)


def test_runs_and_drawing_try_the_kernel_where_they_compute(tmp_path):
    config = load("demo", [f"output={tmp_path}", "backbone.attention=_native_cudnn"])
    with pytest.raises(ValueError, match="'_native_cudnn' gives no gradient to train with on cpu"):
        Trainer(config)
    with pytest.raises(ValueError, match="'_native_cudnn' does not run on cpu"):
        frozen_backbone(config, None, "cpu")


@pytest.mark.parametrize(
    ("capability", "cudnn", "hip", "preferred"),
    [
        ((9, 0), 92000, None, True),
        ((9, 0), 91500, None, False),  # which reads beyond some sequences
        ((9, 0), 3050000, "6.4", False),  # ROCm, with a version of its own library
        ((8, 0), 92000, None, False),
        ((10, 0), 92000, None, False),
        (None, 92000, None, False),
    ],
    ids=["H100", "old cuDNN", "ROCm", "A100", "B200", "CPU"],
)
def test_cudnn_is_preferred_on_capability_9_0(capability, cudnn, hip, preferred, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert prefers_cudnn() is preferred
