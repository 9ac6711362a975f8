"""The passes of a run over its micro-batch, on PyTorch's meta device: what `flowbp estimate` adds up.

A pass runs the code that training runs, at the run's own resolution, batch and prompt length, but without weights and
without a GPU. Bytes are counted for every tensor that it makes and frees, FLOPs for every operation.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowbp.backbones.base import Backbone, bind_velocity
from flowbp.backbones.quantise import linear_layers
from flowbp.config.schema import BackboneConfig, RunConfig, ScorerConfig
from flowbp.estimate.architectures import IMAGE_TOWERS, SIZES, ImageTower, read_backbone
from flowbp.guidance import GuidedVelocity
from flowbp.methods import draw_plans
from flowbp.objective import reward_gradient
from flowbp.plan import Plan
from flowbp.rewards import Reward
from flowbp.rewards.registry import EMBEDDED, find_folders, find_source, weight_dtype
from flowbp.rewards.weighted import WeightedRewards
from flowbp.runtime.embeddings import BATCH
from flowbp.runtime.memory import save_memory
from flowbp.runtime.tuning import trainable_parameters
from flowbp_kernels.dequantised_linear import PackedLinear
from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.meta_results import MetaResults
from flowbp_kernels.offload import default_blocks, offload_blocks
from flowbp_kernels.sweep import record


class ModelsPass(NamedTuple):
    """Bytes of the weights of models beside the network, and the peak that a pass of them adds.

    notes: a line for each part that could not be counted.
    """

    weight_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A config, and the part of it that a pass depends on. The cache of a pass compares that part alone."""

    config: RunConfig = field(compare=False)
    relevant: str


# `suggest` tries many configs, and most of them leave a pass as it is. The keys that can change one, as pydantic's
# `include` takes them:
PLAN = dict.fromkeys(("seed", "backbone", "rollout", "method", "plans"), True) | {"data": {"batch_size"}}
NETWORK = {"guidance": True, "tuning": {"mode", "rank", "dropout", "targets"}}
NETWORK |= PLAN | {"memory": {"checkpointing", "nodes_per_forward", "offload"}}
REWARD = {"reward": True, "evaluation": {"watch", "monitors"}}
REWARD |= PLAN | {"memory": {"reward_batch", "vae_checkpointing", "vae_slicing", "vae_tiling"}}


def network_pass(config: RunConfig) -> "NetworkPass":
    """The passes of the run's network. Raises ValueError or OSError if the backbone's architecture is unknown."""
    return _network_pass(Case(config, config.model_dump_json(include=NETWORK)))


def reward_pass(config: RunConfig) -> ModelsPass:
    """Rewards and monitors of the run; their pass is that of the decoder and the rewards, forward and backward."""
    return _reward_pass(Case(config, config.model_dump_json(include=REWARD)))


def draw_plan(config: RunConfig, draw: int, sigmas: np.ndarray) -> Plan:
    """A plan of the run's batch."""
    rng = np.random.default_rng((config.seed, draw))
    return draw_plans(config.method, sigmas, rng, config.data.batch_size, config.plans, config.rollout.solver)


# -- network ---------------------------------------------------------------------------------------------------------


class NetworkPass:
    """The network, and its passes over one micro-batch: a forward pass and a replay.

    parameters, trained   numbers of parameters; largest: elements of the largest trained tensor
    trained_bytes         what is trained; frozen_bytes: the rest of the network that lies on the device
    weight_bytes          all of the network but its buffers
    block_bytes           the most weights that FSDP2 holds unsharded at a time; trained_block_bytes: trained ones alone
    home_bytes            what `memory.offload` keeps in CPU memory; its copies on the device count to the passes
    vae_bytes             weights of the VAE
    latent_bytes          one latent of the micro-batch
    forward_bytes         peak of a forward pass without gradient, with both branches of guidance
    forward_flops         FLOPs of one branch of it
    graph_bytes           the graph of a replay of `memory.nodes_per_forward` nodes
    replay_bytes          peak of such a replay, forward and backward
    sigmas                [N + 1] noise levels of the rollout
    batched               whether one call of the network takes both branches of guidance
    """

    def __init__(self, case: Case):
        config, size = case.config, case.config.rollout
        backbone = _backbone(config)
        denoiser, self.vae_bytes = backbone.denoiser, bytes_of(tensors(backbone.pipe.vae))
        self.parameters = sum(p.numel() for p in denoiser.parameters())
        pack(denoiser, config.backbone.quantise and config.backbone.quantise.weights)
        with torch.device("meta"):
            trained = trainable_parameters(backbone, config.tuning).values()
        self.trained, self.largest = sum(p.numel() for p in trained), max(p.numel() for p in trained)
        self.trained_bytes, self.weight_bytes = bytes_of(trained), bytes_of(denoiser.parameters())
        self.home_bytes = send_home(denoiser) if config.memory.offload is not None else 0
        self.frozen_bytes = bytes_of(tensors(denoiser)) - self.trained_bytes - self.home_bytes
        self.block_bytes = block_bytes(denoiser, lambda p: True)
        self.trained_block_bytes = block_bytes(denoiser, lambda p: p.requires_grad)
        denoiser.train(config.tuning.dropout > 0)
        for p in trained:
            p.grad = torch.zeros_like(p)
        latents = _latents(backbone, config, config.data.batch_size)
        self.latent_bytes, self.batched = latents.nbytes, backbone.guidance_branches == "batched"
        self.sigmas = backbone.sigmas(size.num_steps, size.height, size.width, size.sigmas).double().numpy()
        plan = draw_plan(config, 0, self.sigmas)
        counted = {FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        flops = FlopCounterMode(display=False, custom_mapping=counted)
        with on_meta(), LiveBytes([*tensors(denoiser), *(p.grad for p in trained)]) as live:
            before = live.alive
            velocity = bind_velocity(backbone, [""] * config.data.batch_size, config.guidance)
            for _ in range(2 if self.home_bytes else 1):  # offloaded blocks are fetched ahead from the second pass on
                with torch.no_grad(), flops:
                    velocity.branches(latents, torch.empty((), device="meta"))
            self.forward_bytes, live.peak = live.peak - before, live.alive
            self.graph_bytes = _replay(velocity, latents, plan, config.memory.nodes_per_forward, live)
            self.replay_bytes = live.peak - before
        self.forward_flops = flops.get_total_flops() // (1 + config.guidance.active)


_network_pass = cache(NetworkPass)


def _backbone(config: RunConfig) -> Backbone:
    """The run's backbone on the meta device with the run's memory switches."""
    backbone, _ = read_backbone(config.backbone)
    save_memory(backbone, config.memory)
    return backbone


def _latents(backbone: Backbone, config: RunConfig, rows: int) -> Tensor:
    shape = backbone.latent_shape(*backbone.token_grid(config.rollout.height, config.rollout.width))
    return torch.empty(rows, *shape, device="meta").to(backbone.latents_dtype)


def _replay(velocity: GuidedVelocity, x: Tensor, plan: Plan, nodes: int, live: LiveBytes) -> int:
    """Replay `nodes` of the plan's nodes in one forward pass, or all if there are fewer, and back; returns the bytes of
    the graph.
    """
    nodes, sigma = min(nodes, len(plan.replays)), torch.empty((), device="meta")
    if nodes > 1:
        x, sigma = torch.cat([x] * nodes), sigma.expand(nodes * len(x))
    before = live.alive
    graph = record(velocity.replay, x, sigma, any(replay.gated for replay in plan.replays))
    graph_bytes = live.alive - before
    graph.v.backward(torch.empty_like(graph.v))
    return graph_bytes


def block_bytes(denoiser: nn.Module, counts: Callable[[nn.Parameter], bool]) -> int:
    """The most bytes that FSDP2 holds unsharded at a time, of the parameters that count.

    These are two blocks, because the next one is fetched ahead, and all parameters outside of blocks.
    """
    blocks = [module for module in denoiser.modules() if type(module).__name__ in denoiser._no_split_modules]
    sizes = sorted(bytes_of(filter(counts, block.parameters())) for block in blocks)
    return bytes_of(filter(counts, denoiser.parameters())) - sum(sizes[:-2])


def send_home(model: nn.Module) -> int:
    """Offload the frozen weights of the blocks, as `memory.offload` does; returns their bytes in CPU memory.

    On the meta device they stay where they are, and are copied all the same.
    """
    offload_blocks(model, "meta")
    return bytes_of(t for block in default_blocks(model) for t in tensors(block) if not t.requires_grad)


# -- weights in 4 or 8 bits ------------------------------------------------------------------------------------------


def pack(model: nn.Module, method: str | None) -> None:
    """Put a `PackedLinear` in the place of every layer that a run quantises by `method`."""
    for parent, name in list(linear_layers(model, method)) if method is not None else ():
        setattr(parent, name, PackedLinear(parent.get_submodule(name), method))


# -- decoder and rewards ---------------------------------------------------------------------------------------------


@cache
def _reward_pass(case: Case) -> ModelsPass:
    config, evaluation, batch = case.config, case.config.evaluation, case.config.data.batch_size
    backbone = _backbone(config)
    rewards = {name: _reward(spec) for name, spec in config.reward.items()}
    monitors = [_reward(spec) for spec in evaluation.monitors.values()] if evaluation and evaluation.watch else []
    weighted = WeightedRewards({name: spec.term(reward=rewards[name].reward) for name, spec in config.reward.items()})
    plan = draw_plan(config, 0, np.linspace(1, 0, config.rollout.num_steps + 1))
    samples = batch * (1 + plan.num_renoised)
    z = _latents(backbone, config, min(samples, config.memory.reward_batch or samples))

    def score(part: Tensor, which: slice) -> Tensor:
        return weighted.score(backbone.decode(part), [""] * len(part), list(range(len(part))))

    models = [term.reward.model for term in weighted.terms.values() if isinstance(term.reward, ImageTower)]
    with on_meta(), LiveBytes(t for module in (backbone.pipe.vae, *models) for t in tensors(module)) as live:
        before = live.alive
        reward_gradient(weighted, score, z, torch.ones(len(z), device="meta"))
        peak_bytes = live.peak - before
    loaded = [*rewards.values(), *monitors]
    notes = tuple(each.note for each in loaded if each.note)
    return ModelsPass(sum(each.weight_bytes for each in loaded), peak_bytes, notes)


class MetaReward(NamedTuple):
    """A stand-in for a reward on the meta device, the bytes of the reward's weights, and a note of what is missing."""

    reward: Reward
    weight_bytes: int
    note: str = ""


def _reward(spec: ScorerConfig) -> MetaReward:
    if ":" in spec.name:
        note = f"the reward {spec.name} is code of your own: its weights and its graph are not counted"
        return MetaReward(_no_graph, 0, note)
    source, tower = find_source(spec.name), IMAGE_TOWERS.get(spec.name)
    dtype = getattr(torch, weight_dtype(spec.dtype or ("float32" if tower else "bfloat16")))
    parameters = source.parameters
    if tower is not None and (spec.model in EMBEDDED or (spec.model is not None and Path(spec.model).is_dir())):
        folder = find_folders(spec.name, source, spec.model, None)["model"]
        if (folder / "config.json").is_file():
            parameters, tower = _read_clip(folder)
    weight_bytes = parameters * dtype.itemsize
    if tower is None:
        note = f"the graph of the reward {spec.name} is not counted, its weights are"
        return MetaReward(_no_graph, weight_bytes, note)
    return MetaReward(ImageTower(tower, "meta", dtype), weight_bytes)


def _read_clip(folder: Path) -> tuple[int, transformers.CLIPVisionConfig]:
    """(parameters, config of the image tower) of the CLIP model in `folder`."""
    config = transformers.CLIPConfig.from_pretrained(folder)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in transformers.CLIPModel(config).parameters())
    config.vision_config.projection_dim = config.projection_dim
    return parameters, config.vision_config


def _no_graph(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(dim=1)


# -- text encoders ---------------------------------------------------------------------------------------------------


@cache
def text_pass(options: BackboneConfig, offload: bool = False) -> ModelsPass:
    """The backbone's text encoders; their pass embeds as many prompts as `flowbp.runtime.embeddings` does at a time.

    offload: as `memory.offload` does, layer by layer.
    """
    backbone, encoders = read_backbone(options)
    for encoder in encoders:
        pack(encoder.requires_grad_(False), options.quantise and options.quantise.text_encoders)
    home = sum(map(send_home, encoders)) if offload else 0
    with torch.no_grad(), on_meta(), LiveBytes(t for encoder in encoders for t in tensors(encoder)) as live:
        weight_bytes = live.alive
        for _ in range(2 if offload else 1):
            _embed(backbone, encoders)
        return ModelsPass(weight_bytes - home, live.peak - weight_bytes)


def _embed(backbone: Backbone, encoders: list[transformers.PreTrainedModel]) -> None:
    """One batch of prompts, joined as the pipelines do it: SD3 joins the states of both CLIPs before T5 runs, and
    FLUX.2 [klein] stacks the states of three layers before it copies them into place.
    """
    states, stacks = [], isinstance(encoders[0], transformers.Qwen3ForCausalLM)
    for encoder in encoders:
        states.append(_encode(encoder, backbone.text_tokens))
        clips = [state[1] for state in states if isinstance(state, tuple)]
        _clips = torch.cat(clips, dim=-1) if len(clips) > 1 else None
    _joined = [backbone.encode([""] * BATCH) for _ in range(1 + stacks)]


def _encode(encoder: transformers.PreTrainedModel, tokens: int) -> Any:
    """Hidden states of one batch of prompts, as long as the encoder pads them."""
    options, at = dict(SIZES["calls"].get(type(encoder).__name__, {})), {"device": "meta"}
    if isinstance(encoder.config, transformers.CLIPTextConfig):
        tokens = encoder.config.max_position_embeddings
    if isinstance(encoder.config, transformers.Qwen3Config):
        options["attention_mask"] = torch.ones(BATCH, 1, tokens, tokens, dtype=torch.bool, **at)
    output = encoder(input_ids=torch.zeros(BATCH, tokens, dtype=torch.int64, **at), **options)
    projected = isinstance(encoder, transformers.CLIPTextModelWithProjection)
    return (output[0], output.hidden_states[-2]) if projected else output


# -- counting --------------------------------------------------------------------------------------------------------

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextmanager
def on_meta() -> Iterator[None]:
    """Let attention on the meta device save for its backward pass what fused kernels save, and let no operation run
    twice on tensors of the same shapes.

    The plain formula of attention would save matrices [B, heads, tokens, tokens] instead.
    """

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        return FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        with MetaResults():
            yield
    finally:
        F.scaled_dot_product_attention = plain


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def bytes_of(parts: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in parts)
