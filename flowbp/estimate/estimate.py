"""Predicted peak memory and relative cost of a run's training step, without a GPU and without weights.

    peak       =  max(embedding, resident + max(rollout, reward, sweep, update, checkpoint))
    resident   =  weights of network, VAE and rewards, master weights, optimizer state, moving average
    rollout    =  cached rollout + kept graphs + one forward pass without gradient
    reward     =  cached rollout + kept graphs + decoder and reward graph of `memory.reward_batch` samples
    sweep      =  cached rollout + gradients + other kept graphs + one replay of `memory.nodes_per_forward` nodes
    update     =  gradients + one more copy of the trained parameters, which AdamW makes on a GPU
    checkpoint =  the largest trained tensor, put together from its shards
    embedding  =  text encoders and one batch of prompts, before the rest is on the device

The passes are run on the meta device (`passes`). What an allocator adds to their live bytes (fragmentation, workspaces,
the CUDA context) is not counted. No estimate was compared with a GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowbp.config import RunConfig, load
from flowbp.estimate.passes import ModelsPass, NetworkPass, draw_plan, network_pass, reward_pass, text_pass
from flowbp.plan import PlanBatch, SurrogatePlan
from flowbp.trajectory import ring_rows

MARGIN = 0.15  # of a GPU's memory left for what is not counted
DRAWS = 64  # plans that a method's node counts are averaged over


def estimate(config: RunConfig, processes: int = 1) -> "Estimate":
    """The estimate of one of `processes`. Raises ValueError or OSError if the backbone's architecture is unknown."""
    return Estimate(config, processes, network_pass(config), reward_pass(config), text_pass(config.backbone))


@dataclass(frozen=True)
class Estimate:
    """Memory of one process in bytes, and cost of one micro-batch, from the passes over that micro-batch."""

    config: RunConfig
    processes: int
    network: NetworkPass
    reward: ModelsPass
    text: ModelsPass

    def as_dict(self) -> dict:
        """For JSON."""
        names = "resident working peaks trained calls sampling notes peak peak_phase relative_cost".split()
        network = {name: getattr(self.network, name) for name in ("parameters", "forward_flops")}
        return network | {name: getattr(self, name) for name in names}

    def fits(self, memory: float) -> bool:
        """Whether the peak leaves MARGIN of `memory` bytes free."""
        return self.peak <= (1 - MARGIN) * memory

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return self.network.trained

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be counted, a line each."""
        notes = self.reward.notes
        if self.config.memory.recompute == "auto" and self.config.memory.budget_gb is None:
            notes += ("memory.recompute=auto keeps graphs in what memory is left: counted as always",)
        if self.shards > 1:
            states = self.resident["optimizer"] + self.resident["moving average"]
            saved = (self.stepped_bytes + states * self.shards) / 1e9
            notes += (f"a checkpoint passes through the CPU memory of the main process: {saved:.1f} GB",)
        return notes

    # -- the plans and the processes ---------------------------------------------------------------------------------

    @cached_property
    def plans(self) -> list[SurrogatePlan | PlanBatch]:
        """DRAWS plans of the run's method."""
        return [draw_plan(self.config, draw, self.network.sigmas) for draw in range(DRAWS)]

    @cached_property
    def replays(self) -> list[int]:
        """The number of replays of each plan."""
        return [len(plan.replays) for plan in self.plans]

    @property
    def kept_graphs(self) -> int:
        """The most graphs that the rollout keeps."""
        memory, most = self.config.memory, max(self.replays)
        fit = int((memory.budget_gb or 0) * 1e9) // max(1, self.network.graph_bytes)
        return {"always": 0, "never": most, "auto": min(fit, most)}[memory.recompute]

    @property
    def shards(self) -> int:
        """How many processes split the weights."""
        return self.processes if self.config.memory.shard else 1

    @property
    def splits_gradients(self) -> bool:
        """Whether every backward pass splits gradients: the config says so, or a step has only one backward pass."""
        only_one = max(self.replays) == 1 and self.config.data.accumulate == 1
        return self.shards > 1 and (only_one or self.config.memory.shard_gradients)

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def wide_bytes(self) -> int:
        """The trained weights in float32, or in the network's dtype if that is wider."""
        return max(self.network.trained_bytes, 4 * self.trained)

    @property
    def stepped_bytes(self) -> int:
        """The weights that the optimizer steps: master weights, or the network's own."""
        return self.wide_bytes if self.config.tuning.master_weights else self.network.trained_bytes

    @cached_property
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

    @cached_property
    def working(self) -> dict[str, int]:
        """Bytes that come and go in a step."""
        network, split = self.network, self.splits_gradients
        # FSDP2 adds gradients up and reduces them in float32
        whole = self.wide_bytes if self.shards > 1 else network.trained_bytes
        cached = max(len(plan.cached_latents) + len(plan.cached_velocities) for plan in self.plans)
        cached += ring_rows(self.config.rollout.solver)
        return {
            "gradients": network.trained_bytes // self.shards if split else whole,
            "gradients of two blocks": network.trained_block_bytes * whole // network.trained_bytes if split else 0,
            "cached rollout": (cached + 3) * network.latent_bytes,  # with noise, sample and reward input
            "one node's graph": network.graph_bytes,
            "kept graphs": self.kept_graphs * network.graph_bytes,
            "forward pass": network.forward_bytes,
            "replay with backward": network.replay_bytes,
            "reward with backward": self.reward.peak_bytes,
            "update": self.stepped_bytes // self.shards,
        }

    @cached_property
    def peaks(self) -> dict[str, int]:
        """Bytes that each part of a run takes in all."""
        working, always = self.working, sum(self.resident.values())
        earlier = working["gradients"] if self.config.data.accumulate > 1 else 0  # of other micro-batches
        cached = always + working["cached rollout"] + working["kept graphs"]
        gradients = working["gradients"] + working["gradients of two blocks"]
        already = working["one node's graph"] if self.kept_graphs else 0
        peaks = {
            "rollout": cached + earlier + working["forward pass"],
            "reward": cached + earlier + working["reward with backward"],
            "sweep": cached + gradients + max(working["replay with backward"] - already, 0),
            "update": always + 2 * working["update"],  # gradients in the dtype that is stepped
        }
        if self.shards > 1:  # shards are put together one tensor after the other, each in the dtype that is stepped
            peaks["checkpoint"] = always + self.network.largest * self.stepped_bytes // self.trained
        if self.config.data.embeddings == "cached" and self.text.weight_bytes:
            peaks["embedding"] = self.text.weight_bytes + self.text.peak_bytes
        return peaks

    @property
    def peak_phase(self) -> str:
        """The part of a run that takes the most."""
        return max(self.peaks, key=self.peaks.get)

    @property
    def peak(self) -> int:
        """The most bytes that a part of the run takes."""
        return self.peaks[self.peak_phase]

    # -- time --------------------------------------------------------------------------------------------------------

    def branches_at(self, node: int) -> int:
        """Network calls of the rollout at a node."""
        return 2 if self.config.guidance.guides(self.network.sigmas[node]) else 1

    @property
    def calls(self) -> dict[str, float]:
        """Forward passes of one micro-batch, averaged over the plans.

        A backward pass counts as two, and as three where it runs the forward pass of its blocks again.
        """
        config, replays = self.config, float(np.mean(self.replays))
        with_gradient = 2 if config.guidance.active and not config.guidance.detach_negative else 1
        last = config.rollout.num_steps - 1
        visited = [[*range(plan.num_steps(last + 1)), *[last] * plan.num_renoised] for plan in self.plans]
        return {
            "rollout": float(np.mean([sum(map(self.branches_at, nodes)) for nodes in visited])),
            "replays": 0.0 if config.memory.recompute == "never" else replays * with_gradient,
            "backward": replays * with_gradient * (3 if config.memory.checkpointing else 2),
        }

    @property
    def sampling(self) -> int:
        """Forward passes of plain sampling."""
        return sum(map(self.branches_at, range(self.config.rollout.num_steps)))

    @property
    def relative_cost(self) -> float:
        """Network time of a step over that of sampling the same images."""
        return sum(self.calls.values()) / self.sampling


# -- what fits -------------------------------------------------------------------------------------------------------


def suggest(
    name: str, overrides: Iterable[str], memory: float, processes: int = 1
) -> Iterator[tuple[list[str], int, Estimate]]:
    """(overrides to add, processes, the estimate) of the run as it is, and of ever smaller ones, of which the last fits
    into `memory` bytes or is the smallest found.

    Each round takes the first change that acts on the phase of the peak and lowers the peak. Changes that leave the
    step as it is come first. Where none helps, the weights are sharded over twice as many processes, as long as that
    does.
    """
    overrides, added = list(overrides), []

    def estimate_with(more: list[str], processes: int) -> Estimate:
        return estimate(load(name, [*overrides, *more], run_code=False), processes)

    found = estimate_with([], processes)
    yield added, processes, found
    left = changes(found.config)
    while not found.fits(memory):
        acting = [(change, processes) for phases, change in left if found.peak_phase in phases]
        for change, count in [*acting, (["memory.shard=true"], 2 * processes)]:
            candidate = over(added, change)
            tried = estimate_with(candidate, count)
            if tried.peak < found.peak:
                break
        else:
            break
        left = [(phases, other) for phases, other in left if other != change]
        added, processes, found = candidate, count, tried
        yield added, processes, found


def without_masters(config: RunConfig, processes: int = 1) -> Estimate | None:
    """The estimate of the same run with `tuning.master_weights=false`; None where no trained weight has a master.

    `suggest` never suggests this: in bfloat16 most steps of a fine-tuning learning rate round to nothing.
    """
    if not estimate(config, processes).resident["master weights"]:
        return None
    narrow = config.tuning.model_copy(update={"master_weights": False})
    return estimate(config.model_copy(update={"tuning": narrow}), processes)


def over(added: list[str], change: list[str]) -> list[str]:
    """`change` in the place of older overrides of its keys."""
    keys = {override.partition("=")[0] for override in change}
    return [old for old in added if old.partition("=")[0] not in keys] + change


def changes(config: RunConfig) -> list[tuple[tuple[str, ...], list[str]]]:
    """(phases whose memory it lowers, overrides), in the order in which they are tried."""
    passes, samples, accumulate = ("rollout", "reward", "sweep"), config.data.batch_size, config.data.accumulate
    batches = [b for b in range(samples // 2, 0, -1) if samples % b == 0]
    return [
        (("reward",), ["memory.vae_checkpointing=true", "memory.reward_batch=1"]),
        (("rollout", "sweep"), ["memory.checkpointing=true"]),
        *((passes, [f"data.batch_size={b}", f"data.accumulate={accumulate * samples // b}"]) for b in batches),
        (passes, ["memory.recompute=always", "memory.budget_gb=null"]),
        (("sweep",), ["memory.nodes_per_forward=1"]),
        *([((*passes, "update"), ["tuning.mode=lora"])] if config.tuning.init is None else []),
        ((*passes, "update"), ["optimizer.name=adamw8bit"]),
    ]
