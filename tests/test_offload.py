"""`memory.offload=blocks`: a run computes the same bits, with two blocks of the network on the device at a time."""

import numpy as np
import pytest
import torch
from autograd_graph import as_graph
from safetensors.torch import load_file

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.config import ConfigError, load
from flowbp.evaluation.scores import generate
from flowbp.methods import METHODS
from flowbp.replay import Recompute
from flowbp.runtime.embeddings import embed_once, text_encoders
from flowbp.runtime.memory import offload, save_memory
from flowbp.runtime.tuned_model import frozen_backbone
from flowbp.runtime.tuning import trainable_parameters
from flowbp.surrogate import backward, reward_input
from flowbp.training.run import train
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout
from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.offload import Visits

SHORT = ["data.batch_size=2", "rollout.num_steps=6", "checkpoint_every=1", "evaluation=null"]
CHECKPOINTING, OFFLOAD = "memory={checkpointing: true}", "memory={checkpointing: true, offload: blocks}"


def tiny(tmp_path, *overrides):
    return load("demo", [f"output={tmp_path / 'run'}", *SHORT, *overrides])


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


def tuned_backbone(config):
    """The backbone of `config` with a LoRA that is not at its start, where half of the gradient is 0."""
    backbone = load_backbone(**config.backbone.model_dump())
    torch.manual_seed(0)
    trainable_parameters(backbone, config.tuning)
    for p in backbone.denoiser.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    save_memory(backbone, config.memory)
    return backbone


# -- gradients and memory of every class -------------------------------------------------------------------------------


def gradients(velocity, noise, sigmas, parameters):
    """By replays, by kept graphs and by one graph of all nodes."""
    found = {}
    plan = METHODS["flowbp-bridge"](num_active=2, alpha=0.7).plan(sigmas.double().numpy(), np.random.default_rng(0))
    for mode in ("always", "never", "graph"):
        trajectory = rollout(
            velocity, noise, sigmas, plan, recompute=Recompute("never" if mode == "never" else "always")
        )
        if mode == "graph":
            as_graph(plan, trajectory, velocity.replay).pow(3).mean().backward()
        else:
            z = reward_input(plan, trajectory).requires_grad_()
            (g,) = torch.autograd.grad(z.pow(3).mean(), z)
            backward(plan, trajectory, velocity.replay, g)
        for name, p in parameters.items():
            if p.grad is not None:
                found[f"{mode} {name}"], p.grad = p.grad, None
    return found


def test_sweep_and_graph_have_the_same_bits_and_two_blocks_on_the_device(backbone_overrides, tmp_path):
    """With fused ops, of every class."""
    scale = 1.0 if "Flux" in backbone_overrides[0] else 3.0
    config = tiny(tmp_path, *backbone_overrides, "backbone.kernels=auto", f"guidance.scale={scale}", CHECKPOINTING)
    found, peaks = [], []
    for offloaded in (False, True):
        backbone = tuned_backbone(config)
        denoiser, sigmas = backbone.denoiser, backbone.sigmas(4, 32, 32)
        if offloaded:
            offload(backbone, "cpu")
        velocity = bind_velocity(backbone, ["a red circle", "two blue stars"], config.guidance)
        noise = backbone.noise(32, 32, [torch.Generator().manual_seed(s) for s in (0, 1)])
        parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        with LiveBytes([*denoiser.parameters(), *denoiser.buffers()]) as live:
            before, live.peak = live.alive, live.alive
            found.append(gradients(velocity, noise, sigmas, parameters))
            peaks.append(live.peak - before)
    assert found[0] and equal(*found)
    blocks = [visitor.block for visitor in visitors(denoiser)]
    sizes = sorted(sum(t.nbytes for t in (*b.parameters(), *b.buffers()) if not t.requires_grad) for b in blocks)
    assert len(sizes) >= 2 and 0 < peaks[1] - peaks[0] <= sum(sizes[-2:])


def test_the_network_and_the_encoders_compute_on_their_device_and_nothing_pulls_the_blocks_there(
    backbone_overrides, tmp_path
):
    """meta stands for a GPU: an operation on tensors of both devices raises."""
    config = tiny(tmp_path, *backbone_overrides, CHECKPOINTING)
    backbone = tuned_backbone(config)
    conditioning = backbone.encode(["a red circle", "two blue stars"])
    offload(backbone, "meta")
    backbone.pipe.to("meta")
    assert {backbone.denoiser.device.type, backbone.text_device.type, backbone.pipe.vae.device.type} == {"meta"}
    noise = backbone.noise(32, 32, [torch.Generator().manual_seed(s) for s in (0, 1)])
    # a length is a number
    moved = {name: value if name == "lengths" else value.to("meta") for name, value in conditioning.items()}
    if backbone.embeds_guidance:
        moved["guidance"] = torch.full((2,), 3.5, device="meta")
    v = backbone.velocity(noise, torch.tensor(0.5, device="meta"), moved)
    v.sum().backward()
    assert v.device.type == "meta" and all(
        p.grad is not None for p in backbone.denoiser.parameters() if p.requires_grad
    )
    tokens = torch.ones(1, 8, dtype=torch.int64, device="meta")
    for module in (backbone.denoiser, *text_encoders(backbone).values()):
        for visitor in visitors(module):
            assert all(home.device.type == "cpu" for _, _, home in visitor.homes)
        if module is not backbone.denoiser:
            assert module(tokens)[0].device.type == "meta"


def visitors(module):
    """Those of the blocks of `module`, in its order."""
    return [part._apply.__self__ for part in module.modules() if "_apply" in vars(part)]


# -- runs --------------------------------------------------------------------------------------------------------------


def outcome(config):
    """What a step of a run logs and leaves, and how many blocks of its network visit."""
    trainer = Trainer(config)
    logged = {k: v for k, v in trainer.step(0).items() if not k.endswith(("seconds", "_mb"))}
    return logged, trainer.model.masters, len(visitors(trainer.model.backbone.denoiser))


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_of_every_method_has_the_same_bits(name, tmp_path):
    """And with the other switches of a run, one beside each method."""
    number = list(METHODS).index(name)
    extra = ["method.last_n=4"] if name == "refl" else []
    extra += [
        "anchor={weight: 0.5}",
        "memory.nodes_per_forward=2",
        "memory.recompute=never",
        "tuning.dropout=0.3",
        "backbone.kernels=auto",
        "memory={recompute: auto, budget_gb: 0.001}",
        "backbone.dtype=bfloat16",
    ][number : number + 1]
    row, weights, none = outcome(tiny(tmp_path, f"method.name={name}", *extra, "memory.checkpointing=true"))
    same_row, same_weights, blocks = outcome(
        tiny(tmp_path, f"method.name={name}", *extra, "memory.checkpointing=true", "memory.offload=blocks")
    )
    assert none == 0 and blocks == 4 and same_row == row and equal(same_weights, weights)


def test_a_run_resumes_exactly_evaluates_and_samples_as_one_whose_blocks_stay(tmp_path, monkeypatch):
    for module in ("flowbp.training.run", "flowbp.evaluation.pages"):
        monkeypatch.setattr(f"{module}.as_png", lambda figure: b"a picture")
    evaluation = "evaluation={prompts: shapes:test, samples: 2, num_steps: 2, checker: shapes}"
    plain = tiny(tmp_path / "plain", "steps=2", evaluation, CHECKPOINTING, "ema=0.5")
    home = tiny(tmp_path / "home", "steps=1", evaluation, OFFLOAD, "ema=0.5", f"data.cache={tmp_path}")
    longer = home.model_copy(update={"steps": 2})
    train(plain)
    train(home)
    train(longer, resume=True)
    results = [load_file(config.output / "pytorch_lora_weights.safetensors") for config in (plain, longer)]
    assert equal(*results)
    numbers = [(config.output / "evaluation.json").read_text() for config in (plain, longer)]
    assert numbers[0].replace("plain", "home") == numbers[1]
    drawn = []
    for config in (plain, longer):
        backbone = frozen_backbone(config, config.output, "cpu")
        assert len(visitors(backbone.denoiser)) == (0 if config is plain else 4)
        assert all(bool(visitors(part)) == (config is longer) for part in text_encoders(backbone).values())
        drawn.append(generate(backbone, ["a red circle"], [7], config.evaluation_rollout, config.evaluation_guidance))
    assert torch.equal(*drawn)


def test_embeddings_have_the_same_bits_where_the_blocks_of_all_encoders_visit(
    backbone_overrides, tmp_path, monkeypatch
):
    fetched, fetch = [], Visits._fetch
    monkeypatch.setattr(Visits, "_fetch", lambda self, who: (fetched.append(self), fetch(self, who))[1])
    files = []
    for offloaded in (False, True):
        backbone = load_backbone(**tiny(tmp_path, *backbone_overrides).backbone.model_dump())
        encoders = len(text_encoders(backbone))
        embed_once(backbone, ["a red circle"], tmp_path / str(offloaded), "cpu", offloaded)
        files.append({path.name: path for path in (tmp_path / str(offloaded)).rglob("*.safetensors")})
        assert len(set(fetched)) == (encoders if offloaded else 0)
    assert len(files[0]) == 2 and all(files[0][name].read_bytes() == files[1][name].read_bytes() for name in files[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["memory.offload=blocks"], "offload=blocks needs checkpointing=true"),
        ([OFFLOAD, "memory.shard=true"], "offload=blocks needs shard=false"),
        ([OFFLOAD, "tuning.mode=full"], "offload=blocks needs tuning.mode=lora"),
        ([OFFLOAD, "compile=inductor"], "offload=blocks needs compile=null, not inductor"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, *overrides)
