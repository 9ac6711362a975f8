"""Predicted peak memory and relative cost of a run's training step, without a GPU and without weights.

    peak  =  max(embedding, resident + max(rollout, reward, sweep, update))
    resident  =  weights of network, VAE and rewards, master weights, optimizer state, moving average
    rollout   =  cached rollout + kept graphs + one forward pass without gradient
    reward    =  cached rollout + kept graphs + decoder and reward graph of `memory.reward_batch` samples
    sweep     =  cached rollout + gradients + other kept graphs + one replay with its backward pass (of
    `memory.nodes_per_forward` nodes)
    update    =  gradients + one more copy of the trained parameters, which AdamW makes on a GPU
    checkpoint = the largest trained tensor, put together from its shards
    embedding =  text encoders and one batch of prompts, before the rest is on the device

The passes are run on the meta device (`passes`). What an allocator adds to their live bytes (fragmentation, workspaces,
the CUDA context) is not counted. No estimate was compared with a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from flowbp.config import RunConfig, load
from flowbp.estimate.passes import NetworkPass, RewardPass, TextPass, draw_plan, network_pass, reward_pass, text_pass
from flowbp.plan import PlanBatch, SurrogatePlan

__all__ = ["MARGIN", "Estimate", "estimate", "parse_size", "suggest", "without_masters"]

MARGIN = 0.15  # of a GPU's memory left for what is not counted
DRAWS = 64  # plans that a method's node counts are averaged over
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Estimate:
    """Bytes on one process, parameters, and network calls of one micro-batch in units of one forward pass over the
    batch.

    resident, working: terms by name. peaks: all that each part of a run takes. parameters, trained: of the network.
    calls: forward passes of the rollout, of the replays, and the equivalent of their backward passes. sampling: forward
    passes of plain sampling. forward_flops: of one forward pass. notes: what could not be counted.
    """

    resident: dict[str, int]
    working: dict[str, int]
    peaks: dict[str, int]
    parameters: int
    trained: int
    calls: dict[str, float]
    sampling: int
    forward_flops: int
    notes: tuple[str, ...]

    @property
    def peak_phase(self) -> str:
        """The part of a run that takes the most."""
        return max(self.peaks, key=self.peaks.get)

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
        return asdict(self) | {"peak": self.peak, "peak_phase": self.peak_phase, "relative_cost": self.relative_cost}


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """The estimate of one process of `processes`. Raises ValueError or OSError where the backbone's architecture is not
    known.
    """
    network, reward = network_pass(config), reward_pass(config)
    plans = [draw_plan(config, draw, network.sigmas) for draw in range(DRAWS)]
    run = Run(config, processes, network, reward, text_pass(config), plans)
    notes = reward.notes
    if config.memory.recompute == "auto" and config.memory.budget_gb is None:
        notes += ("memory.recompute=auto keeps graphs in what memory is left: counted as always",)
    if run.shards > 1:
        saved = run.stepped_bytes + sum(run.resident[name] for name in ("optimizer", "moving average")) * run.shards
        notes += (f"a checkpoint passes through the CPU memory of the main process: {saved / 1e9:.1f} GB",)
    sampling = config.rollout.num_steps * run.branches
    return Estimate(
        run.resident,
        run.working,
        run.peaks,
        network.parameters,
        network.trained,
        run.calls,
        sampling,
        network.forward_flops,
        notes,
    )


@dataclass(frozen=True)
class Run:
    """What an estimate is made of: the passes over one micro-batch, the plans, and how many processes share the
    work.
    """

    config: RunConfig
    processes: int
    network: NetworkPass
    reward: RewardPass
    text: TextPass
    plans: list[SurrogatePlan | PlanBatch]

    @property
    def shards(self) -> int:
        """Processes that split the weights."""
        return self.processes if self.config.memory.shard else 1

    @property
    def replays(self) -> list[int]:
        """Active nodes of each plan."""
        return [len(plan.replays) for plan in self.plans]

    @property
    def branches(self) -> int:
        """Network calls of a guided velocity."""
        return 2 if self.config.guidance.active else 1

    @property
    def kept_graphs(self) -> int:
        """The most that the rollout keeps."""
        memory, most = self.config.memory, max(self.replays)
        fit = int((memory.budget_gb or 0) * 1e9) // max(1, self.network.graph_bytes)
        return {"always": 0, "never": most, "auto": min(fit, most)}[memory.recompute]

    @property
    def splits_gradients(self) -> bool:
        """Whether sharded gradients are split in every backward pass: told to, or because a step has one alone."""
        only_one = max(self.replays) == 1 and self.config.data.accumulate == 1
        return self.shards > 1 and (only_one or self.config.memory.shard_gradients)

    # -- memory
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def wide_bytes(self) -> int:
        """The trained weights in float32, or wider where the network has them so."""
        return max(self.network.trained_bytes, 4 * self.network.trained)

    @property
    def stepped_bytes(self) -> int:
        """What the optimizer steps: master weights, or the network's own."""
        return self.wide_bytes if self.config.tuning.master_weights else self.network.trained_bytes

    @property
    def resident(self) -> dict[str, int]:
        """Bytes that are there from the first step to the last."""
        config, network, shards, stepped = self.config, self.network, self.shards, self.stepped_bytes
        moments = {"adamw": 2 * stepped, "adamw8bit": 2 * network.trained}[config.optimizer.name]
        return {
            "frozen weights": network.frozen_bytes // shards,
            "trained weights": network.trained_bytes // shards,
            "gathered blocks": network.block_bytes if shards > 1 else 0,
            "VAE": network.vae_bytes,
            "rewards and monitors": self.reward.weight_bytes,
            "text encoders": self.text.weight_bytes if config.data.embeddings == "live" else 0,
            "master weights": stepped // shards if stepped > network.trained_bytes else 0,
            "optimizer": moments // shards,
            "moving average": self.wide_bytes // shards if config.ema is not None else 0,
        }

    @property
    def working(self) -> dict[str, int]:
        """Bytes that come and go in a step."""
        network = self.network
        whole = (
            self.wide_bytes if self.shards > 1 else network.trained_bytes
        )  # FSDP2 adds gradients up and reduces them in float32
        cached = (
            max(len(plan.cached_latents) + len(plan.cached_velocities) for plan in self.plans) + 3
        )  # noise, sample, reward input
        return {
            "gradients": network.trained_bytes // self.shards if self.splits_gradients else whole,
            "gradients of two blocks": network.trained_block_bytes * whole // network.trained_bytes
            if self.splits_gradients
            else 0,
            "cached rollout": cached * network.latent_bytes,
            "one node's graph": network.graph_bytes,
            "kept graphs": self.kept_graphs * network.graph_bytes,
            "forward pass": network.forward_bytes,
            "replay with backward": network.replay_bytes,
            "reward with backward": self.reward.peak_bytes,
            "update": self.stepped_bytes // self.shards,
        }

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes that each part of a run takes in all."""
        working, always = self.working, sum(self.resident.values())
        earlier = working["gradients"] if self.config.data.accumulate > 1 else 0  # of other micro-batches
        between = working["cached rollout"] + working["kept graphs"]
        gradients = working["gradients"] + working["gradients of two blocks"]
        already = working["one node's graph"] if self.kept_graphs else 0
        peaks = {
            "rollout": always + earlier + between + working["forward pass"],
            "reward": always + earlier + between + working["reward with backward"],
            "sweep": always + gradients + between + max(working["replay with backward"] - already, 0),
            "update": always + 2 * working["update"],  # gradients in the dtype that is stepped
        }
        if self.shards > 1:  # shards are put together one tensor after the other, each in the dtype that is stepped
            peaks["checkpoint"] = always + self.network.largest * self.stepped_bytes // self.network.trained
        embeds_first = self.config.data.embeddings == "cached" and self.text.weight_bytes
        return peaks | ({"embedding": self.text.weight_bytes + self.text.peak_bytes} if embeds_first else {})

    # -- time
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> dict[str, float]:
        """Forward passes of one micro-batch, averaged over the plans; a backward pass counts as two, and one more where
        it recomputes.
        """
        config, replays = self.config, float(np.mean(self.replays))
        with_gradient = 1 if config.guidance.detach_negative else self.branches
        steps = float(np.mean([plan.num_steps(config.rollout.num_steps) + plan.num_renoised for plan in self.plans]))
        return {
            "rollout": steps * self.branches,
            "replays": 0.0 if config.memory.recompute == "never" else replays * with_gradient,
            "backward": replays * with_gradient * (3 if config.memory.checkpointing else 2),
        }


# -- what fits
# --------------------------------------------------------------------------------------------------------------------


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
    """(overrides to add, processes, the estimate) of a run that fits into `memory` bytes, or of the smallest that was
    found.

    Each round takes the first change that acts where the peak is and lowers it: changes that leave the step as it is
    come first. Then the weights are sharded over twice as many processes, and again, as long as that helps.
    """
    overrides, added = list(overrides), []
    config = load(name, overrides)
    found, left = estimate(config, processes), changes(config)
    while not found.fits(memory):
        for phases, change in left:
            candidate = over(added, change)
            tried = estimate(load(name, [*overrides, *candidate]), processes) if found.peak_phase in phases else found
            if tried.peak < found.peak:
                break
        else:
            break
        left.remove((phases, change))
        added, found = candidate, tried
    while not found.fits(memory):
        candidate = over(added, ["memory.shard=true"])
        tried = estimate(load(name, [*overrides, *candidate]), 2 * processes)
        if tried.peak >= found.peak:
            break
        added, processes, found = candidate, 2 * processes, tried
    return added, processes, found


def without_masters(config: RunConfig, processes: int = 1) -> Estimate | None:
    """The estimate of the same run with `tuning.master_weights=false`; None where no trained weight has a master.

    `suggest` never takes this way: in bfloat16 most steps of a fine-tuning learning rate round to nothing.
    """
    if not estimate(config, processes).resident["master weights"]:
        return None
    return estimate(
        config.model_copy(update={"tuning": config.tuning.model_copy(update={"master_weights": False})}), processes
    )


def over(added: list[str], change: list[str]) -> list[str]:
    """`change` in the place of older overrides of its keys."""
    keys = {override.partition("=")[0] for override in change}
    return [old for old in added if old.partition("=")[0] not in keys] + change


def changes(config: RunConfig) -> list[tuple[tuple[str, ...], list[str]]]:
    """(phases whose memory it lowers, overrides), in the order in which they are tried."""
    passes, batches = ("rollout", "reward", "sweep"), range(config.data.batch_size // 2, 0, -1)
    samples, accumulate = config.data.batch_size, config.data.accumulate
    return [
        (("reward",), ["memory.vae_checkpointing=true", "memory.reward_batch=1"]),
        (("rollout", "sweep"), ["memory.checkpointing=true"]),
        *(
            (passes, [f"data.batch_size={b}", f"data.accumulate={accumulate * samples // b}"])
            for b in batches
            if samples % b == 0
        ),
        (passes, ["memory.recompute=always", "memory.budget_gb=null"]),
        (("sweep",), ["memory.nodes_per_forward=1"]),
        ((*passes, "update"), ["tuning.mode=lora"]),
        ((*passes, "update"), ["optimizer.name=adamw8bit"]),
    ]
