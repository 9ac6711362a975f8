"""A quantised base: gradients are those of its dequantised weights, runs resume, and what would be wrong is refused."""

import functools
import importlib.util
import json
from copy import copy, deepcopy

import numpy as np
import pytest
import torch
from autograd_graph import as_graph
from safetensors.torch import load_file
from tiny_pipelines import TINY_PIPELINES, tiny_pipeline
from torch import nn
from typer.testing import CliRunner

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.backbones.classes import BACKBONES
from flowbp.cli.commands import app
from flowbp.config import ConfigError, build_method, load
from flowbp.config.schema import QuantiseConfig, TuningConfig
from flowbp.evaluation.models import run_evaluation
from flowbp.guidance import Guidance
from flowbp.methods import METHODS
from flowbp.runtime.checkpoint import save_checkpoint
from flowbp.runtime.embeddings import encoder_hash, text_encoders
from flowbp.runtime.inputs import check_inputs
from flowbp.runtime.run_folder import RunFolder
from flowbp.runtime.tuning import trainable_parameters
from flowbp.runtime.weights import LORA, load_weights, save_weights, start_from
from flowbp.surrogate import backward, reward_input
from flowbp.training.run import train
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout
from flowbp_kernels.blocks.fused import Fused

bnb = pytest.importorskip("bitsandbytes", reason='needs pip install "flowbp[quantise]"')
pytest.importorskip("torchao", reason='needs pip install "flowbp[quantise]"')

SD3, FLUX, FLUX2, ZIMAGE = TINY_PIPELINES
WIDER = {SD3: 4, FLUX: 2, FLUX2: 2, ZIMAGE: 2}  # 64 wide: nf4 quantises rows of whole blocks
KINDS = ("nf4", "int8", "float8")
CASES = [(name, kind) for name in TINY_PIPELINES for kind in KINDS]


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    """To draw those of a report takes longer than to train."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("flowbp.training.run", "flowbp.evaluation.pages"):
            patch.setattr(f"{module}.as_png", lambda figure: b"a picture")
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("pipelines") / name
        tiny_pipeline(name, wider=WIDER[name]).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture(scope="module")
def quantised(saved):
    """(class, method or None, options of load_backbone) -> a backbone with a transformer of its own, in that method."""

    @functools.cache
    def loaded(name, kind, **options):
        return load_backbone(saved(name), max_sequence_length=48, quantise={"weights": kind}, **options)

    def build(name, kind, **options):
        backbone = copy(loaded(name, kind, **options))
        backbone.pipe = copy(backbone.pipe)
        backbone.pipe.transformer = deepcopy(backbone.pipe.transformer)
        return backbone

    return build


def dequantised(layer):
    """The weight with which `layer` computes if it is quantised, else None."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if type(weight).__module__.startswith("torchao") else None


def values_of(model):
    """The dequantised weights of a model's quantised layers, by the name of the layer."""
    found = {name: dequantised(module) for name, module in model.named_modules()}
    return {name: value for name, value in found.items() if value is not None}


def put(model, weights):
    """`weights` in the place of the plain weights of the same layers."""
    for name, value in weights.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and value.shape == layer.weight.shape and not torch.equal(value, layer.weight)
        layer.weight = nn.Parameter(value.detach().clone(), requires_grad=False)


def with_lora(backbone, **options):
    """The parameters of a LoRA with random entries: a fresh one gives lora_A no gradient."""
    parameters = trainable_parameters(backbone, TuningConfig(rank=2, **options))
    with torch.no_grad():
        for name, p in parameters.items():
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return parameters


@pytest.fixture
def pair(quantised):
    """(class, method) -> the quantised backbone, and the plain one with its dequantised weights."""

    def build(name, kind, **options):
        both = quantised(name, kind), quantised(name, None)
        put(both[1].denoiser, values_of(both[0].denoiser))
        return [(backbone, with_lora(backbone, **options)) for backbone in both]

    return build


def problem(backbone, method="flowbp-sparse"):
    """A plan of `method` and its trajectory of six steps on `backbone`."""
    guidance = Guidance(embedded=3.5 if backbone.embeds_guidance else None)
    velocity = bind_velocity(backbone, ["a red circle"], guidance)
    sigmas = backbone.sigmas(6, 32, 32)
    fields = {"last_n": 2} if method == "refl" else {}
    plan = build_method({"name": method} | fields).plan(sigmas.double().numpy(), np.random.default_rng(0))
    noise, *copies = (
        backbone.noise(32, 32, [torch.Generator().manual_seed(seed)]) for seed in range(1 + plan.num_renoised)
    )
    torch.manual_seed(0)  # of dropout
    return plan, rollout(velocity, noise, sigmas, plan, copies), velocity


def sweep(backbone, parameters, method="flowbp-sparse"):
    """The reward's input z, and the gradient of the sum of z^3 / 3 by the sweep."""
    plan, trajectory, velocity = problem(backbone, method)
    for p in parameters.values():
        p.grad = None
    z = reward_input(plan, trajectory)
    backward(plan, trajectory, velocity.replay, z.square())
    return z, torch.cat([p.grad.flatten() for p in parameters.values()])


def graph(backbone, parameters):
    """The gradient of `sweep`, by one autograd graph."""
    plan, trajectory, velocity = problem(backbone)
    z = as_graph(plan, trajectory, velocity.replay)
    return torch.cat([g.flatten() for g in torch.autograd.grad(z.pow(3).sum() / 3, list(parameters.values()))])


def check_close(found, expected, tolerance=1e-6):
    assert (found - expected).norm() <= tolerance * expected.norm() > 0


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_values_and_gradients_are_those_of_the_dequantised_weights(pair, name, kind):
    ours, plain = pair(name, kind)
    for found, expected in zip((*sweep(*ours), graph(*ours)), (*sweep(*plain), graph(*plain)), strict=True):
        check_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_gradient_is_that_of_the_dequantised_weights(pair, method):
    ours, plain = pair(SD3, "int8")
    for found, expected in zip(sweep(*ours, method), sweep(*plain, method), strict=True):
        check_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_over_a_quantised_base_what_it_draws_over_a_plain_one(pair, kind):
    ours, plain = pair(SD3, kind, dropout=0.3)
    for backbone, _ in (ours, plain):
        backbone.denoiser.train()
    for found, expected in zip(sweep(*ours), sweep(*plain), strict=True):
        check_close(found, expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_fused_ops_run_over_a_quantised_base_what_peft_runs(quantised, name, kind, monkeypatch):
    taken, project = [], Fused.project
    spy = functools.wraps(project)(lambda self, layer, x: taken.append(layer) or project(self, layer, x))
    monkeypatch.setattr(Fused, "project", spy)
    plain, fused = quantised(name, kind), quantised(name, kind, kernels="auto")
    results = [sweep(backbone, with_lora(backbone)) for backbone in (plain, fused)]
    for found, expected in zip(*reversed(results), strict=True):
        check_close(found, expected, 5e-6)
    assert any(dequantised(layer.base_layer) is not None for layer in taken if hasattr(layer, "lora_A"))


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_graph_keeps_the_quantised_weight_and_no_copy(quantised, kind):
    layer = next(m for m in quantised(SD3, kind).denoiser.modules() if dequantised(m) is not None)
    x, kept = torch.randn(3, layer.in_features, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert [type(tensor) for tensor in kept] == [type(layer.weight)]
    (found,) = torch.autograd.grad(y.pow(2).sum(), x)
    check_close(found, 2 * y.detach() @ dequantised(layer))


def test_a_cpus_kernel_for_inference_never_repacks_the_weights_that_backward_reads(monkeypatch, quantised):
    """It would, on a CPU with bfloat16 instructions, in the first forward pass without gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layer = next(m for m in quantised(SD3, "nf4").denoiser.modules() if dequantised(m) is not None)
    weight, x = dequantised(layer), torch.randn(3, layer.in_features)
    with torch.no_grad():
        check_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    y = layer(x.requires_grad_())
    check_close(torch.autograd.grad(y, x, y.detach())[0], y.detach() @ weight)


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_of_the_blocks_are_quantised(quantised, kind):
    for name in TINY_PIPELINES:
        backbone, plain = quantised(name, kind), quantised(name, None)
        values = values_of(backbone.denoiser)
        blocks = plain.denoiser._no_split_modules
        within = [n for n, m in plain.denoiser.named_modules() if type(m).__name__ in blocks]
        linear = {n: m for n, m in plain.denoiser.named_modules() if type(m) is nn.Linear}
        expected = {n for n, m in linear.items() if any(n.startswith(f"{block}.") for block in within)}
        if kind == "nf4":
            expected = {n for n in expected if linear[n].in_features % 64 == 0}
        assert values.keys() == expected and 0 < len(expected) < len(linear)
        limit = {"nf4": 0.11, "int8": 0.01, "float8": 0.03}[kind]
        for layer, value in values.items():
            assert 0 < (value - linear[layer].weight).norm() < limit * value.norm(), layer
        parts = [part for part in backbone.pipe.components.values() if isinstance(part, nn.Module)]
        assert not any(values_of(part) for part in parts if part is not backbone.denoiser)


def test_nf4_leaves_rows_that_are_no_whole_blocks(tmp_path):
    """bitsandbytes 0.50 reads the scales of such rows in the wrong places on a CPU."""
    tiny_pipeline(FLUX).save_pretrained(tmp_path)
    layers = values_of(load_backbone(str(tmp_path), quantise={"weights": "nf4"}).denoiser)
    assert layers and all(value.shape[1] % 64 == 0 for value in layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_bfloat16_stays_one(quantised, kind):
    backbone = quantised(FLUX, kind, dtype="bfloat16")
    parameters = with_lora(backbone)
    sample, gradient = sweep(backbone, parameters)
    assert backbone.denoiser.dtype == backbone.pipeline_dtype == torch.bfloat16
    assert sample.isfinite().all() and gradient.isfinite().all() and gradient.dtype == torch.float32
    copied = deepcopy(backbone.denoiser)
    for name, value in values_of(copied).items():
        assert torch.equal(value, dequantised(backbone.denoiser.get_submodule(name)))


@pytest.mark.parametrize(("name", "kind"), [("shapes", "nf4"), (SD3, "int8"), (FLUX, "float8"), (FLUX2, "int8")])
def test_text_encoders_embed_by_their_dequantised_weights_and_hash_apart(saved, name, kind):
    folder = name if name == "shapes" else saved(name)
    plain, ours = (load_backbone(folder, quantise={"text_encoders": method}) for method in (None, kind))
    assert encoder_hash(ours) not in (encoder_hash(plain), encoder_hash(load_backbone(folder)))
    for part, encoder in text_encoders(ours).items():
        values = values_of(encoder)
        assert values and not any(layer.endswith(("wo", "lm_head")) for layer in values)
        put(getattr(plain.pipe, part), values)
    expected = plain.encode(["a red circle"])
    for key, value in ours.encode(["a red circle"]).items():
        check_close(value, expected[key])
    assert encoder_hash(plain) != encoder_hash(ours)  # whose library has a version


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of two runs over a base in the given method: an unbroken one, and one that was resumed."""

    @functools.cache
    def runs(kind):
        folder = tmp_path_factory.mktemp(kind)
        settings = ["steps=2", "data.batch_size=2", "rollout.num_steps=6", "checkpoint_every=1", "tuning.rank=2"]
        settings += ["evaluation=null", "anchor={weight: 0.5}", "backbone.kernels=auto"]
        settings += [f"backbone.quantise={{weights: {kind}, text_encoders: {kind}}}"]
        whole, broken = (load("demo", [f"output={folder / name}", *settings]) for name in ("whole", "broken"))
        train(whole)
        stopped = Trainer(broken)
        RunFolder(broken.output).open(broken)
        (broken.output / "metrics.jsonl").write_text(json.dumps({"step": 1} | stopped.step(0)) + "\n")
        save_checkpoint(broken.output, 1, stopped.model, stopped.optimizer, stopped.rewards)
        train(broken, resume=True)
        return whole.output, broken.output

    return runs


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(finished, kind):
    whole, broken = (load_file(folder / LORA) for folder in finished(kind))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)
    moved = [value.norm() > 0 for key, value in whole.items() if "lora_B" in key]
    assert any(moved)


def test_a_run_is_scored_over_the_base_it_trained_on_or_over_the_plain_one(finished, tmp_path):
    scores = []
    for base in ("{weights: int8}", "null"):
        out = tmp_path / f"eval-{len(scores)}"
        size = "evaluation={prompts: 'shapes:test', samples: 2, batch_size: 2}"
        command = ["eval", str(finished("int8")[0]), "--out", str(out), f"backbone.quantise={base}", size]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        scores.append((out / "samples.json").read_text())
    assert scores[0] != scores[1]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if kind != "float8"])
def test_a_lora_is_read_over_any_base(pair, quantised, name, kind, tmp_path):
    (ours, parameters), (plain, _) = pair(name, kind)
    save_weights(ours, tmp_path)
    expected, _ = sweep(ours, parameters)
    read = quantised(name, kind)
    load_weights(read, tmp_path)
    assert torch.equal(problem(read)[1].sample, expected)
    begun = quantised(name, kind)
    check_close(sweep(begun, start_from(tmp_path, begun, TuningConfig(rank=3)))[0], expected, 5e-6)
    half = quantised(name, kind)
    load_weights(half, tmp_path, strength=0.5)
    assert not torch.allclose(problem(half)[1].sample, expected, rtol=1e-3)

    pipe = plain.pipe  # diffusers' own reading over the dequantised weights
    pipe.transformer.delete_adapters("default")
    pipe.transformer.unload_lora()
    pipe.load_lora_weights(tmp_path)
    check_close(problem(plain)[1].sample, expected, 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_an_anchor_is_the_quantised_network_without_its_adapter(quantised, kind):
    backbone = quantised(FLUX, kind)
    expected = problem(backbone)[1].sample
    with_lora(backbone)
    assert not torch.equal(problem(backbone)[1].sample, expected)
    backbone.denoiser.disable_adapters()
    assert torch.equal(problem(backbone)[1].sample, expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["tuning.mode=full", "memory.shard=all", "compile=inductor"])
def test_what_cannot_be_right_is_refused_by_name(override):
    with pytest.raises(ConfigError, match=f"{override} with backbone.quantise.weights=int8: .*leave one of the two"):
        load("demo", ["backbone.quantise.weights=int8", override])
    load("demo", ["backbone.quantise.text_encoders=int8", override])


def test_nf4_is_compiled():
    assert load("demo", ["backbone.quantise.weights=nf4", "compile=inductor"]).compile == "inductor"


@pytest.mark.parametrize(("kind", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("float8", "torchao")])
def test_a_missing_library_is_named_with_the_extra(kind, library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("flowbp.backbones.find_spec", lambda name: None if name == library else find(name))
    says = rf'backbone.quantise.weights={kind} needs {library}: pip install "flowbp\[quantise\]"'
    with pytest.raises(ValueError, match=says):
        check_inputs(load("demo", [f"backbone.quantise.weights={kind}"]), train=True)
    with pytest.raises(ValueError, match=says):
        load_backbone("shapes", quantise={"weights": kind, "text_encoders": None})


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="backbone.quantise.weights: Input should be 'nf4', 'int8' or 'float8'"):
        load("demo", ["backbone.quantise.weights=fp4"])
    with pytest.raises(ValueError, match="backbone.quantise.weights is 'fp4'; known: nf4, int8, float8, null"):
        load_backbone("shapes", quantise={"weights": "fp4"})


def test_all_weights_of_a_run_do_not_replace_quantised_ones(quantised, tmp_path):
    save_weights(BACKBONES[SD3](tiny_pipeline(SD3, wider=WIDER[SD3])), tmp_path)
    with pytest.raises(ValueError, match="holds all weights, plain ones: .*backbone.quantise.weights=null"):
        load_weights(quantised(SD3, "int8"), tmp_path)


def test_an_evaluation_refuses_them_before_it_draws(tmp_path):
    save_weights(BACKBONES[SD3](tiny_pipeline(SD3, wider=WIDER[SD3])), tmp_path)
    config = load("demo", ["backbone.quantise=int8", f"output={tmp_path}"])
    with pytest.raises(ValueError, match="holds all weights, plain ones: .*backbone.quantise.weights=null"):
        run_evaluation(config, {"base": None, "full": tmp_path}, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


def test_a_word_is_short_for_the_format_of_the_weights():
    assert load("demo", ["backbone.quantise=nf4"]).backbone.quantise == QuantiseConfig(weights="nf4")
