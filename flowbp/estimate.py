"""Predicted peak memory and relative cost of a run's training step, without a GPU and without weights.

    peak  =  resident + max(rollout, reward, sweep, update)
    resident  =  weights of network, VAE and rewards, optimizer state, moving average
    rollout   =  cached rollout + kept graphs + one forward pass without gradient
    reward    =  cached rollout + kept graphs + decoder and reward graph of `memory.reward_batch` samples
    sweep     =  cached rollout + gradients + other kept graphs + one replay with its backward pass (of `memory.nodes_per_forward` nodes)
    update    =  gradients + one more copy of the trained parameters, which AdamW makes on a GPU

The three passes are run on the meta device, at the run's own resolution and batch, by the code that a training step runs; live bytes are
counted there. What an allocator adds to them (fragmentation, workspaces, the CUDA context) is not. No estimate was compared with a GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel

from flowbp.architectures import IMAGE_TOWERS, ImageTower, made_on, read_backbone
from flowbp.backbones import Backbone, bind_velocity
from flowbp.config import RunConfig, ScorerConfig, load
from flowbp.methods import draw_plans
from flowbp.objective import reward_gradient
from flowbp.performance import LiveBytes, save_memory
from flowbp.replay import record
from flowbp.rewards import Mixture
from flowbp.rewards.registry import EMBEDDED, find_folders, find_source
from flowbp.tuning import trainable_parameters

__all__ = ["MARGIN", "Estimate", "estimate", "parse_size", "suggest"]

MARGIN = 0.15  # of a GPU's memory left for what is not counted
DRAWS = 64  # plans that a method's node counts are averaged over
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Estimate:
    """Bytes on one process, parameters, and network calls of one micro-batch in units of one forward pass over the batch.

    resident, working: terms by name. phases: working bytes of each part of a run, in addition to `resident`. parameters, trained: of the
    network. calls: forward passes of the rollout, of the replays, and the equivalent of their backward passes. sampling: forward passes of
    plain sampling. forward_flops: of one forward pass. notes: what could not be counted.
    """

    resident: dict[str, int]
    working: dict[str, int]
    phases: dict[str, int]
    parameters: int
    trained: int
    calls: dict[str, float]
    sampling: int
    forward_flops: int
    notes: tuple[str, ...]

    @property
    def peak_phase(self) -> str:
        """The part of a run that takes the most."""
        return max(self.phases, key=self.phases.get)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes that each part of a run takes in all."""
        return {name: sum(self.resident.values()) + working for name, working in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.peaks[self.peak_phase]

    @property
    def relative_cost(self) -> float:
        """Network time of a step over that of sampling the same images."""
        return sum(self.calls.values()) / self.sampling

    def fits(self, memory: float) -> bool:
        """Whether the peak leaves MARGIN of `memory` bytes free."""
        return self.peak <= (1 - MARGIN) * memory

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"peaks": self.peaks, "peak": self.peak, "peak_phase": self.peak_phase, "relative_cost": self.relative_cost}


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """The estimate of one process of `processes`. Raises ValueError or OSError where the backbone's architecture is not known."""
    network = network_pass(_key(config, REWARD_ONLY, "evaluation"))
    reward = reward_pass(_key(config, NETWORK_ONLY, "tuning"))
    memory, shards = config.memory, processes if config.memory.shard else 1
    plans = [_plan(config, draw, network.sigmas) for draw in range(DRAWS)]
    replays = [len(plan.sweep) for plan in plans]
    moments = {"adamw": 2 * network.trained_bytes, "adamw8bit": 2 * network.trained}[config.optimizer.name]
    resident = {
        "frozen weights": network.frozen_bytes // shards,
        "trained weights": network.trained_bytes // shards,
        "gathered blocks": network.gathered_bytes if shards > 1 else 0,
        "VAE": network.vae_bytes,
        "rewards and monitors": reward.weight_bytes,
        "text encoders": network.text_encoder_bytes if config.data.embeddings == "live" else 0,
        "optimizer": moments // shards,
        "moving average": network.trained_bytes // shards if config.ema is not None else 0,
        "gradient buckets": network.trained_bytes if processes > 1 and shards == 1 else 0,
    }
    cached = max(len(plan.cached_latents) + len(plan.cached_velocities) for plan in plans) + 3  # noise, sample, reward input
    kept = {"always": 0, "never": max(replays), "auto": int((memory.budget_gb or 0) * 1e9) // max(1, network.graph_bytes)}[memory.recompute]
    kept = min(kept, max(replays))
    accumulates = max(replays) > 1 or config.data.accumulate > 1  # sharded gradients are reduced in the last backward pass alone
    gradients = network.trained_bytes if shards == 1 or accumulates else network.trained_bytes // shards
    before = gradients if config.data.accumulate > 1 else 0  # of earlier micro-batches
    working = {
        "gradients": gradients,
        "cached rollout": cached * network.latent_bytes,
        "one node's graph": network.graph_bytes,
        "kept graphs": kept * network.graph_bytes,
        "forward pass": network.forward_bytes,
        "replay with backward": network.replay_bytes,
        "reward with backward": reward.peak_bytes,
        "update": network.trained_bytes // shards,
    }
    between = working["cached rollout"] + working["kept graphs"]
    first = max(network.replay_bytes - (network.graph_bytes if kept else 0), 0)  # a kept graph is there already
    phases = {
        "rollout": before + between + network.forward_bytes,
        "reward": before + between + reward.peak_bytes,
        "sweep": gradients + between + first,
        "update": gradients // (shards if accumulates else 1) + working["update"],
    }
    if config.data.embeddings == "cached":  # all is loaded before it is sharded, nothing trained yet
        loaded = network.frozen_bytes + network.base_bytes + network.vae_bytes + network.text_encoder_bytes
        phases |= {"embedding": loaded - sum(resident.values())} if loaded > sum(resident.values()) else {}
    branches = 2 if config.guidance.active else 1
    with_gradient = 1 if config.guidance.detach_negative else branches
    backward = with_gradient * (3 if memory.checkpointing else 2)
    calls = {
        "rollout": float(np.mean([plan.num_steps(config.rollout.num_steps) + plan.num_renoised for plan in plans])) * branches,
        "replays": 0.0 if memory.recompute == "never" else float(np.mean(replays)) * with_gradient,
        "backward": float(np.mean(replays)) * backward,
    }
    notes = reward.notes
    if memory.recompute == "auto" and memory.budget_gb is None:
        notes += ("memory.recompute=auto keeps graphs in what memory is left: counted as always",)
    sampling = config.rollout.num_steps * branches
    return Estimate(resident, working, phases, network.parameters, network.trained, calls, sampling, network.forward_flops, notes)


def _plan(config: RunConfig, draw: int, sigmas: np.ndarray):
    return draw_plans(config.method, sigmas, np.random.default_rng((config.seed, draw)), config.data.batch_size, config.plans)


# -- the passes of a step, on the meta device ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkPass:
    """Bytes of the network and of its passes over one micro-batch; gathered_bytes: two of FSDP's blocks and what belongs to none."""

    parameters: int
    trained: int
    base_bytes: int
    frozen_bytes: int
    trained_bytes: int
    gathered_bytes: int
    vae_bytes: int
    text_encoder_bytes: int
    latent_bytes: int
    forward_bytes: int
    forward_flops: int
    graph_bytes: int
    replay_bytes: int
    sigmas: np.ndarray


@dataclass(frozen=True)
class RewardPass:
    weight_bytes: int
    peak_bytes: int
    notes: tuple[str, ...]


REWARD_ONLY = {"reward_batch", "vae_checkpointing", "vae_slicing", "vae_tiling"}
NETWORK_ONLY = {"checkpointing", "nodes_per_forward"}
NO_PASS = {"recompute", "budget_gb", "shard"}


def _key(config: RunConfig, memory: set[str], *sections: str) -> str:
    """The config as JSON, less what does not change a pass: these keys of `memory`, these sections, and what changes none."""
    values = config.model_dump(mode="json", exclude={*sections, "optimizer", "ema", "steps", "checkpoint_every"})
    for key in memory | NO_PASS:
        del values["memory"][key]
    del values["data"]["accumulate"], values["data"]["embeddings"]
    return json.dumps(values)


@cache
def network_pass(key: str) -> NetworkPass:
    """Forward pass and replay of the run `key` on the meta device."""
    config = RunConfig.model_validate(json.loads(key))
    backbone, text_encoders = _backbone(config)
    denoiser, dtype = backbone.denoiser, getattr(torch, config.backbone.dtype)
    parameters, base_bytes = sum(p.numel() for p in denoiser.parameters()), 0
    with torch.device("meta"):
        trained = trainable_parameters(backbone, config.tuning)
    if config.tuning.mode == "full":
        base_bytes = bytes_of(trained.values())
    denoiser.train(config.tuning.dropout > 0)
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    existing = [*tensors(denoiser), *(p.grad for p in trained.values())]

    batch, size = config.data.batch_size, config.rollout
    sigmas = backbone.sigmas(size.num_steps, size.height, size.width).double().numpy()
    sweep = _plan(config, 0, sigmas).sweep
    nodes = min(config.memory.nodes_per_forward, len(sweep))
    latents = torch.empty(batch, *backbone.latent_shape(*backbone.token_grid(size.height, size.width)), device="meta")
    latents = latents.to(backbone.latents_dtype)
    x, sigma = torch.cat([latents] * nodes), torch.empty((nodes * batch,) if nodes > 1 else (), device="meta")
    with fused_attention():
        with LiveBytes(existing) as live:
            before = live.alive
            velocity = bind_velocity(backbone, [""] * batch, config.guidance)
            with torch.no_grad():
                velocity.branches(latents, torch.empty((), device="meta"))
            forward_bytes, live.peak = live.peak - before, live.alive
            conditioning = live.alive - before
            graph = record(velocity.replay, x, sigma, any(replay.gated for replay in sweep))
            graph_bytes = live.alive - before - conditioning
            graph.v.backward(torch.empty_like(graph.v))
            replay_bytes = live.peak - before
        flops = FlopCounterMode(display=False, custom_mapping={FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
        with flops, torch.no_grad():
            backbone.velocity(latents, torch.empty((), device="meta"), velocity.positive)
    return NetworkPass(
        parameters=parameters,
        trained=sum(p.numel() for p in trained.values()),
        base_bytes=base_bytes,
        frozen_bytes=bytes_of(tensors(denoiser)) - bytes_of(trained.values()),
        trained_bytes=bytes_of(trained.values()),
        gathered_bytes=gathered_bytes(denoiser),
        vae_bytes=bytes_of(tensors(backbone.pipe.vae)),
        text_encoder_bytes=text_encoders * dtype.itemsize,
        latent_bytes=latents.nbytes,
        forward_bytes=forward_bytes,
        forward_flops=flops.get_total_flops(),
        graph_bytes=graph_bytes,
        replay_bytes=replay_bytes,
        sigmas=sigmas,
    )


@cache
def reward_pass(key: str) -> RewardPass:
    """Decoder and rewards of the run `key`, forward and backward, on the meta device."""
    config = RunConfig.model_validate(json.loads(key))
    backbone, _ = _backbone(config)
    terms, weight_bytes, notes = {}, 0, ()
    for name, spec in config.reward.items():
        reward, weights, note = _reward(spec)
        terms[name], weight_bytes, notes = spec.term(reward=reward), weight_bytes + weights, notes + note
    for spec in (config.evaluation.monitors if config.evaluation else {}).values():
        _, weights, note = _reward(spec)
        weight_bytes, notes = weight_bytes + weights, notes + note
    mixture, size = Mixture(terms), config.rollout
    samples = config.data.batch_size * (1 + _plan(config, 0, np.linspace(1, 0, size.num_steps + 1)).num_renoised)
    rows = min(samples, config.memory.reward_batch or samples)
    z = torch.empty(rows, *backbone.latent_shape(*backbone.token_grid(size.height, size.width)), device="meta").to(backbone.latents_dtype)
    existing = [*tensors(backbone.pipe.vae), *(t for term in terms.values() for t in tensors(getattr(term.reward, "model", nn.Module())))]
    with fused_attention(), LiveBytes(existing) as live:
        before = live.alive
        reward_gradient(
            mixture,
            lambda part, _: mixture.score(backbone.decode(part), [""] * len(part), list(range(len(part)))),
            z,
            torch.ones(rows, device="meta"),
        )
        peak = live.peak - before
    return RewardPass(weight_bytes, peak, notes)


def _backbone(config: RunConfig) -> tuple[Backbone, int]:
    """The run's backbone on the meta device with the run's memory switches, and its text encoders' parameters."""
    options = config.backbone
    dtype = getattr(torch, options.dtype)
    backbone, text_encoders = read_backbone(options.name, dtype, options.precision, options.max_sequence_length)
    save_memory(backbone, config.memory)
    return backbone, text_encoders


def _reward(spec: ScorerConfig):
    """(a stand-in on the meta device, bytes of the reward's weights, notes)."""
    if ":" in spec.name:
        return _no_graph, 0, (f"the reward {spec.name} is code of your own: its weights and its graph are not counted",)
    source = find_source(spec.name)
    parameters, tower = source.parameters, IMAGE_TOWERS.get(spec.name)
    dtype = getattr(torch, spec.dtype or ("float32" if tower is not None else "bfloat16"))
    if spec.model in EMBEDDED or (spec.model is not None and Path(spec.model).is_dir()):
        folder = find_folders(spec.name, source, spec.model, None)["model"]
        if tower is not None and (folder / "config.json").is_file():
            config = CLIPConfig.from_pretrained(folder)
            with made_on("meta", dtype):
                parameters, tower = sum(p.numel() for p in CLIPModel(config).parameters()), config.vision_config
            tower.projection_dim = config.projection_dim
    if tower is None:
        return _no_graph, parameters * dtype.itemsize, (f"the graph of the reward {spec.name} is not counted, its weights are",)
    return ImageTower(tower, "meta", dtype), parameters * dtype.itemsize, ()


def _no_graph(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(dim=1)


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on the meta device save what fused kernels save, not the matrices [B, heads, tokens, tokens] of the plain formula."""
    plain = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        return FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def bytes_of(parts: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in parts)


def gathered_bytes(denoiser: nn.Module) -> int:
    """What FSDP2 holds whole at a time: the largest block, the next one, which it fetches meanwhile, and what belongs to no block."""
    blocks = [bytes_of(m.parameters()) for m in denoiser.modules() if type(m).__name__ in denoiser._no_split_modules]
    return bytes_of(denoiser.parameters()) - sum(blocks) + 2 * max(blocks, default=0)


# -- what fits -----------------------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> float:
    """Bytes of "24GB" (1e9), "24GiB" (2^30) or "80e9"."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([KMGT]?I?)B?\s*", text, re.IGNORECASE)
    try:
        size = float(match[1]) * UNITS[match[2].upper()]
    except (TypeError, KeyError, ValueError):
        size = 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"{text!r} is no size in bytes: write 24GB, 24GiB or 80e9")
    return size


def suggest(name: str, overrides: Iterable[str], memory: float, processes: int = 1) -> tuple[list[str], int, Estimate]:
    """(overrides to add, processes, the estimate) of a run that fits into `memory` bytes, or of the smallest that was found.

    Each round takes the first change that acts where the peak is and lowers it: changes that leave the step as it is come first. Then the
    weights are sharded over twice as many processes, and again, as long as that helps.
    """
    overrides, added = list(overrides), []
    config = load(name, overrides)
    found, left = estimate(config, processes), _changes(config)
    while not found.fits(memory):
        for phases, change in left:
            candidate = _over(added, change)
            tried = estimate(load(name, [*overrides, *candidate]), processes) if found.peak_phase in phases else found
            if tried.peak < found.peak:
                break
        else:
            break
        left.remove((phases, change))
        added, found = candidate, tried
    while not found.fits(memory):
        candidate = _over(added, ["memory.shard=true"])
        tried = estimate(load(name, [*overrides, *candidate]), 2 * processes)
        if tried.peak >= found.peak:
            break
        added, processes, found = candidate, 2 * processes, tried
    return added, processes, found


def _over(added: list[str], change: list[str]) -> list[str]:
    """`change` in the place of older overrides of its keys."""
    keys = {override.partition("=")[0] for override in change}
    return [old for old in added if old.partition("=")[0] not in keys] + change


def _changes(config: RunConfig) -> list[tuple[tuple[str, ...], list[str]]]:
    """(phases whose memory it lowers, overrides), in the order in which they are tried."""
    passes, batches = ("rollout", "reward", "sweep"), range(config.data.batch_size // 2, 0, -1)
    samples, accumulate = config.data.batch_size, config.data.accumulate
    return [
        (("reward",), ["memory.vae_checkpointing=true", "memory.reward_batch=1"]),
        (("rollout", "sweep"), ["memory.checkpointing=true"]),
        *((passes, [f"data.batch_size={b}", f"data.accumulate={accumulate * samples // b}"]) for b in batches if samples % b == 0),
        (passes, ["memory.recompute=always", "memory.budget_gb=null"]),
        (("sweep",), ["memory.nodes_per_forward=1"]),
        ((*passes, "update"), ["tuning.mode=lora"]),
        ((*passes, "update"), ["optimizer.name=adamw8bit"]),
    ]
