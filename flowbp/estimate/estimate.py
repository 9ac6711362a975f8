"""Predicted peak memory and relative cost of a run's training step, without a GPU and without weights.

    peak       =  max(embedding, resident + max(rollout, reward, sweep, update, checkpoint))
    resident   =  weights of network, VAE and rewards, master weights, optimizer state, moving average
    rollout    =  cached rollout + kept graphs + one forward pass without gradient + the whole network, where it is
                  gathered once (`memory.gather=rollout`; "auto" does so only where that fits, and is not counted)
    reward     =  cached rollout + kept graphs + decoder and reward graph of `memory.reward_batch` samples
    sweep      =  cached rollout + gradients + other kept graphs + one replay of `memory.nodes_per_forward` nodes
    update     =  gradients + one more copy of the trained parameters, which AdamW makes on a GPU
    checkpoint =  the largest trained tensor, put together from its shards
    embedding  =  text encoders and one batch of prompts, before the rest is on the device

The passes are run on the meta device (`passes`). What an allocator adds to their live bytes (fragmentation, workspaces,
the CUDA context) is not counted. No estimate was compared with a GPU.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flowbp.config import ConfigError, RunConfig, load
from flowbp.estimate.communication import shards
from flowbp.estimate.passes import ModelsPass, NetworkPass, draw_plan, network_pass, reward_pass, text_pass
from flowbp.trajectory import ring_rows

MARGIN = 0.15  # of a GPU's memory left for what is not counted
BANDWIDTH = 25e9  # bytes a second from pinned memory over PCIe 4.0 x16, whose own rate is 32e9: assumed, not measured
DRAWS = 64  # plans that a method's node counts are averaged over


def estimate(config: RunConfig, processes: int = 1) -> "Estimate":
    """The estimate of one of `processes`. Raises ValueError or OSError if the backbone's architecture is unknown."""
    text = text_pass(config.backbone, config.memory.offload is not None)
    return Estimate(config, processes, network_pass(config), reward_pass(config), text)


@dataclass
class Estimate:
    """Memory of one process in bytes, and cost of one micro-batch, from the passes over that micro-batch.

    trained          number of trained parameters
    shards           how many processes split the weights
    plans, replays   DRAWS plans of the run's method, and the number of replays of each
    resident         bytes that are there from the first step to the last
    working          bytes that come and go in a step
    peaks            bytes that each part of a run takes in all; peak: the most of them, in the part peak_phase
    calls            forward passes of one micro-batch, averaged over the plans. A backward pass counts as two, and as
                     three where it runs the forward pass of its blocks again
    sampling         forward passes of plain sampling
    relative_cost    network time of a step over that of sampling the same images
    copied           bytes that `memory.offload` copies to the device in a step, averaged over the plans
    notes            what could not be counted, a line each
    """

    config: RunConfig
    processes: int
    network: NetworkPass
    reward: ModelsPass
    text: ModelsPass

    def __post_init__(self):
        self.trained, self.notes = self.network.trained, self.reward.notes
        self.plans = [draw_plan(self.config, draw, self.network.sigmas) for draw in range(DRAWS)]
        self.shards = shards(self.config.memory.shard, self.processes)
        self.replays = [len(plan.replays) for plan in self.plans]
        self._count_memory()
        self._count_calls()

    def as_dict(self) -> dict:
        """For JSON."""
        names = "resident working peaks trained calls sampling notes peak peak_phase relative_cost copied".split()
        network = {name: getattr(self.network, name) for name in ("parameters", "forward_flops")}
        return network | {name: getattr(self, name) for name in names}

    def fits(self, memory: float) -> bool:
        """Whether the peak leaves MARGIN of `memory` bytes free."""
        return self.peak <= (1 - MARGIN) * memory

    def _count_memory(self) -> None:
        config, network, shards, most = self.config, self.network, self.shards, max(self.replays)
        wide = max(network.trained_bytes, 4 * self.trained)  # the trained weights in float32, or wider as the network's
        stepped = wide if config.tuning.master_weights else network.trained_bytes  # what the optimizer steps
        moments = {"adamw": 2 * stepped, "adamw8bit": 2 * network.trained}[config.optimizer.name]
        copied = network.frozen_bytes + network.trained_bytes if config.tuning.mode == "full" else 0
        self.resident = {
            "frozen weights": network.frozen_bytes // shards,
            "trained weights": network.trained_bytes // shards,
            "gathered blocks": network.block_bytes if shards > 1 else 0,
            "VAE": network.vae_bytes,
            "rewards and monitors": self.reward.weight_bytes,
            "base model": copied if config.anchor else 0,
            "text encoders": self.text.weight_bytes if config.data.embeddings == "live" else 0,
            "master weights": stepped // shards if stepped > network.trained_bytes else 0,
            "optimizer": moments // shards,
            "moving average": wide // shards if config.ema is not None else 0,
        }
        # Every backward pass splits gradients if the config says so, or if a step has only one.
        split = shards > 1 and (config.memory.shard_gradients or most == config.data.accumulate == 1)
        whole = wide if shards > 1 else network.trained_bytes  # FSDP2 adds gradients up and reduces them in float32
        cached = max(len(plan.cached_latents) + len(plan.cached_velocities) for plan in self.plans)
        cached += ring_rows(config.rollout.solver, config.guidance)
        once = shards > 1 and config.memory.gather == "rollout"
        graph = max(1, network.graph_bytes // config.memory.nodes_per_forward)  # a graph that is kept is of one node
        fit = int((config.memory.budget_gb or 0) * 1e9) // graph
        kept = {"always": 0, "never": most, "auto": min(fit, most)}[config.memory.recompute]
        self.working = {
            "gradients": network.trained_bytes // shards if split else whole,
            "gradients of two blocks": network.trained_block_bytes * whole // network.trained_bytes if split else 0,
            "cached rollout": (cached + 3) * network.latent_bytes,  # with noise, sample and reward input
            "one node's graph": network.graph_bytes,
            "kept graphs": kept * graph,
            "forward pass": network.forward_bytes,
            "other blocks": network.weight_bytes - network.block_bytes if once else 0,
            "replay with backward": network.replay_bytes,
            "reward with backward": self.reward.peak_bytes,
            "update": stepped // shards,
        }
        working, always = self.working, sum(self.resident.values())
        earlier = working["gradients"] if config.data.accumulate > 1 else 0  # of other micro-batches
        in_rollout = always + working["cached rollout"] + working["kept graphs"]
        gradients = working["gradients"] + working["gradients of two blocks"]
        already = working["one node's graph"] if kept else 0
        self.peaks = {
            "rollout": in_rollout + earlier + working["forward pass"] + working["other blocks"],
            "reward": in_rollout + earlier + working["reward with backward"],
            "sweep": in_rollout + gradients + max(working["replay with backward"] - already, 0),
            "update": always + 2 * working["update"],  # gradients in the dtype that is stepped
        }
        if shards > 1:  # shards are put together one tensor after the other, each in the dtype that is stepped
            self.peaks["checkpoint"] = always + network.largest * stepped // self.trained
            saved = stepped + (self.resident["optimizer"] + self.resident["moving average"]) * shards
            self.notes += (f"a checkpoint passes through the CPU memory of the main process: {saved / 1e9:.1f} GB",)
        if config.data.embeddings == "cached" and self.text.weight_bytes:
            self.peaks["embedding"] = self.text.weight_bytes + self.text.peak_bytes
        if network.home_bytes:
            self.notes += (f"memory.offload holds {network.home_bytes / 1e9:.1f} GB in pinned CPU memory",)
        if config.memory.recompute == "auto" and config.memory.budget_gb is None:
            self.notes += ("memory.recompute=auto keeps graphs in what memory is left: counted as always",)
        self.peak_phase = max(self.peaks, key=self.peaks.get)
        self.peak = self.peaks[self.peak_phase]

    def _count_calls(self) -> None:
        config, last = self.config, self.config.rollout.num_steps - 1
        branches = [2 if config.guidance.guides(level) else 1 for level in self.network.sigmas[:-1]]  # of each node
        visited = [[*range(plan.num_steps(last + 1)), *[last] * plan.num_renoised] for plan in self.plans]
        with_gradient = 2 if config.guidance.active and not config.guidance.detach_negative else 1
        anchored = [sum(not replay.gated for replay in plan.replays) for plan in self.plans]
        of_replays = float(np.mean(self.replays)) * with_gradient
        self.calls = {
            "rollout": float(np.mean([sum(branches[node] for node in nodes) for nodes in visited])),
            "replays": 0.0 if config.memory.recompute == "never" else of_replays,
            "backward": of_replays * (3 if config.memory.checkpointing else 2),
        } | ({"anchor": float(np.mean(anchored)) * with_gradient} if config.anchor else {})
        self.sampling = sum(branches)
        self.relative_cost = sum(self.calls.values()) / self.sampling
        # A block is copied once a forward pass, and once more in its backward pass. One pass serves several nodes, and
        # both branches of guidance where the backbone calls its network once for them: not at a node that is replayed
        # without the negative branch.
        together, graphs = self.network.batched, 1 if config.memory.recompute == "never" else 2
        forwards = np.mean([sum(1 if together else branches[node] for node in nodes) for nodes in visited])
        if together and config.guidance.active and config.guidance.detach_negative:
            forwards += np.mean(self.replays)
        replays = np.mean([-(-count // config.memory.nodes_per_forward) for count in self.replays]) * graphs
        others = np.mean(anchored) if config.anchor else 0
        copies = forwards + (replays + others) * (1 if together else with_gradient)
        self.copied = int(self.network.home_bytes * config.data.accumulate * copies)


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
    found = estimate(load(name, overrides, run_code=False), processes)
    yield added, processes, found
    left = changes(found.config)
    while not found.fits(memory):
        acting = [(change, processes) for phases, change in left if found.peak_phase in phases]
        for change, count in [*acting, ([f"memory.shard={found.config.memory.shard or 'all'}"], 2 * processes)]:
            candidate = over(added, change)
            try:
                tried = estimate(load(name, [*overrides, *candidate], run_code=False), count)
            except ConfigError:  # what a config refuses together
                continue
            if tried.peak < found.peak:
                break
        else:
            break
        left = [(phases, other) for phases, other in left if other != change]
        added, processes, found = candidate, count, tried
        yield added, processes, found


def without_masters(config: RunConfig, processes: int = 1) -> Estimate:
    """The estimate of the same run with `tuning.master_weights=false`, which `suggest` never suggests: in bfloat16 most
    steps of a fine-tuning learning rate round to nothing.
    """
    narrow = config.tuning.model_copy(update={"master_weights": False})
    return estimate(config.model_copy(update={"tuning": narrow}), processes)


def quantised(
    name: str, overrides: Iterable[str], added: list[str], memory: float, processes: int = 1
) -> tuple[list[str], Estimate] | None:
    """In the place of `memory.offload` among `added`: what quantises the fewest weights, to the most bits, and fits
    into `memory` bytes too; None if nothing does.
    """
    for method, parts in itertools.product(("int8", "nf4"), (["weights"], ["weights", "text_encoders"])):
        change = ["memory.offload=null", *(f"backbone.quantise.{part}={method}" for part in parts)]
        candidate = over(added, change)
        if (found := estimate(load(name, [*overrides, *candidate], run_code=False), processes)).fits(memory):
            return candidate, found
    return None


def over(added: list[str], change: list[str]) -> list[str]:
    """`change` in the place of older overrides of its keys."""
    keys = {override.partition("=")[0] for override in change}
    return [old for old in added if old.partition("=")[0] not in keys] + change


def changes(config: RunConfig) -> list[tuple[tuple[str, ...], list[str]]]:
    """(phases whose memory it lowers, overrides), in the order in which they are tried."""
    passes, samples, accumulate = ("rollout", "reward", "sweep"), config.data.batch_size, config.data.accumulate
    steps = (*passes, "update")
    sizes = [size for size in range(samples, 0, -1) if samples % size == 0]
    batches = [[f"data.batch_size={size}", f"data.accumulate={accumulate * samples // size}"] for size in sizes]
    plain = ["memory.shard=false", "memory.shard_gradients=false"] if config.memory.shard else []
    plain += ["compile=null"] if config.compile else []
    offload = ["memory.checkpointing=true", *plain, "memory.offload=blocks"]
    return [
        (("reward",), ["memory.vae_checkpointing=true", "memory.reward_batch=1"]),
        (("rollout", "sweep"), ["memory.checkpointing=true"]),
        *((passes, batch) for batch in batches[1:]),
        (passes, ["memory.recompute=always", "memory.budget_gb=null"]),
        (("sweep",), ["memory.nodes_per_forward=1"]),
        *([(steps, ["tuning.mode=lora"])] if config.tuning.init is None else []),
        # Each micro-batch copies all blocks: the largest that fits is the cheapest.
        *(((*steps, "embedding"), [*batch, *offload]) for batch in batches),
        *((steps, [*plain, f"backbone.quantise.weights={method}"]) for method in ("int8", "nf4")),
        *((("embedding",), [f"backbone.quantise.text_encoders={method}"]) for method in ("int8", "nf4")),
        (steps, ["optimizer.name=adamw8bit"]),
    ]
