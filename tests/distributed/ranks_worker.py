"""One process of tests/distributed/test_ranks.py: trains tiny networks in float64 as one of several ranks."""

import copy
import os
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from diffusers.utils import logging
from tiny_pipelines import tiny_pipeline
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from flowbp.backbones.classes import BACKBONES
from flowbp.config import load
from flowbp.config.schema import MemoryConfig
from flowbp.evaluation import pages
from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.methods import FlowBPBridge
from flowbp.replay import Recompute
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.runtime.distributed import Ranks, gathered, on_main, shard_like, shard_weights, unshard
from flowbp.runtime.run_folder import RunFolder
from flowbp.surrogate import backward, reward_input
from flowbp.training import run as running
from flowbp.training.run import run as train_run
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout

GLOBAL_BATCH = 4
SD3, FLUX, FLUX2, ZIMAGE = "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline"
LORA = ("tuning.mode=lora", "memory.checkpointing=true", "anchor={weight: 0.3, copy_base: false}")
CASES = {  # name: (pipeline, overrides)
    "sparse, accumulated": (SD3, ("method={name: flowbp-sparse, num_active: 3}", "data.accumulate=2")),
    "bridge, guided": (
        SD3,
        (
            "method={name: flowbp-bridge, num_active: 3, alpha: 0.7}",
            "guidance.scale=3.0",
            "anchor={weight: 0.3, copy_base: true}",
        ),
    ),
    "filtered": (SD3, ("method={name: flowbp-lagrange, alpha: 0.3, max_dj: 0.102}",)),
    "copies, hinge": (SD3, ("method.name=draft-lv", "reward.hinge=-0.1")),
    "two rewards, one normalised": (
        SD3,
        (
            "method={name: flowbp-sparse, num_active: 3}",
            "data.accumulate=2",
            "reward={reward: {normalise: true}, b: {hinge: -0.1}}",
        ),
    ),
    "stratified, in pairs": (
        FLUX2,
        ("method={name: flowbp-sparse, num_active: 3}", "plans=stratified", "memory.nodes_per_forward=2"),
    ),
    "kept graphs": (
        SD3,
        ("method={name: flowbp-bridge, num_active: 3, alpha: 0.7}", "memory.recompute=never", "data.accumulate=2"),
    ),
    "auto": (
        SD3,
        (
            "method={name: flowbp-sparse, num_active: 3}",
            "memory={recompute: auto, budget_gb: 0.002, checkpointing: true}",
        ),
    ),
    "lora": (FLUX2, (*LORA, "method={name: flowbp-bridge, num_active: 3, alpha: 0.7}", "data.accumulate=2")),
    "offloaded lora": (
        FLUX2,
        (*LORA, "memory.offload=blocks", "data.embeddings=cached", "method.name=flowbp-lagrange", "data.accumulate=2"),
    ),
    "sharded lora": (
        FLUX,
        (
            *LORA,
            "memory={shard: node, gather: rollout}",
            "guidance.embedded=3.5",
            "method={name: flowbp-bridge, num_active: 3, alpha: 0.7}",
            "data.accumulate=2",
        ),
    ),
    "sharded bridge": (
        SD3,
        ("method={name: flowbp-bridge, num_active: 3, alpha: 0.7}", "memory.shard=node", "data.accumulate=2"),
    ),
    "sharded, kept graphs": (
        FLUX2,
        ("method.name=flowbp-lagrange", "memory={shard: node, gather: rollout, recompute: never}"),
    ),
    "sharded, auto": (
        SD3,
        (
            "method={name: flowbp-sparse, num_active: 3}",
            "memory={shard: true, gather: rollout, recompute: auto, budget_gb: 0.002}",
        ),
    ),
    "sharded gradients": (
        SD3,
        (
            "method={name: flowbp-bridge, num_active: 3, alpha: 0.7}",
            "memory={shard: node, gather: rollout, shard_gradients: true}",
            "data.accumulate=2",
        ),
    ),
    "sharded gradients, kept graphs": (
        FLUX2,
        (
            "method.name=flowbp-lagrange",
            "memory={shard: true, shard_gradients: true, recompute: never}",
            "guidance.scale=3.0",
        ),
    ),
    "sharded Z-Image, checkpointing": (
        ZIMAGE,
        ("method.name=flowbp-lagrange", "memory={shard: node, checkpointing: true}"),
    ),
}
# what four processes take, as two machines of two
OF_FOUR = ("filtered", "stratified, in pairs", "lora", "sharded lora", "sharded bridge", "sharded, kept graphs")
OF_FOUR += ("sharded gradients", "sharded gradients, kept graphs", "sharded Z-Image, checkpointing")

BFLOAT16 = {  # whose gradients depend on the number of processes: a run resumes exactly with as many
    "bfloat16": (SD3, ("method.name=flowbp-sparse",)),
    "sharded bfloat16": (SD3, ("method.name=flowbp-sparse", "memory.shard=true")),
}

# of runs that are about something else than the gradient of their step
SHORT = ("rollout.num_steps=2", "method={name: refl, last_n: 1}")

RESUMED = (*BFLOAT16, "bridge, guided", "sharded bridge")


def taken(cases, world):
    """Two processes take all, four the last: where they go is the same, and what is sharded is the harder way."""
    return cases if world == 2 else cases[-1:]


@cache
def pipeline(name, dtype):
    torch.manual_seed(0)
    return tiny_pipeline(name).to(dtype)


def reward(images, prompts):
    targets = torch.tensor([len(prompt) % 7 / 7 for prompt in prompts], dtype=images.dtype)
    return -(images - targets.view(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3))


def make_trainer(case, folder, world, *more):
    name, overrides = (CASES | BFLOAT16)[case]
    size = ("rollout.num_steps=6", "rollout.height=32", "rollout.width=32", f"data.batch_size={GLOBAL_BATCH // world}")
    base = ("ema=null", "evaluation=null", "guidance.scale=1.0", "reward.hinge=null", "reward.smooth=null")
    base += ("optimizer.max_grad_norm=1e-3", "data.embeddings=live", "tuning.mode=full", "memory.recompute=always")
    base += (f"output={folder}", f"data.prompts={folder}/prompts.txt")
    pipe = copy.copy(pipeline(name, torch.bfloat16 if case in BFLOAT16 else torch.float64))
    pipe.transformer = copy.deepcopy(pipe.transformer)
    config = load("demo", [*base, *size, *overrides, *more])
    return Trainer(config, backbone=BACKBONES[name](pipe, "pipeline", 16), reward=reward)


def train_step(case, folder, world):
    """(row of the log, the clipped gradient) of one step, as it is on every rank."""
    trainer = make_trainer(case, folder, world)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in trainer.model.parameters.items():  # LoRA starts where half of its gradient is zero
            if "lora_B" in key:
                p.copy_(shard_like(p, torch.randn(p.shape, dtype=p.dtype) / 10))
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({key: p.grad for key, p in trainer.model.parameters.items()})
    )
    row = trainer.step(0)
    zeros = {key: torch.zeros(p.shape, dtype=torch.float64) for key, p in trainer.model.parameters.items()}
    return row, torch.cat(
        [(zeros[key] if g is None else unshard(g).double()).flatten() for key, g in gradients.items()]
    )


def resumes(case, folder, world):
    """(whether a run that goes on from its checkpoint takes the step that the unbroken one takes, the moving average
    after two steps)
    """
    first, second = (make_trainer(case, folder, world, "ema=0.5", *SHORT) for _ in range(2))
    first.step(0)
    output = Path(folder, f"{world} {case}")
    states = [(trainer.model, trainer.optimizer, trainer.rewards) for trainer in (first, second)]
    save_checkpoint(output, 1, *states[0])
    first.model.ranks.accelerator.wait_for_everyone()
    done = load_checkpoint(latest_checkpoint(output), *states[1])
    rows = [{key: trainer.step(done)[key] for key in ("loss", "grad_norm")} for trainer in (first, second)]
    average = flat(first.model.ema.shadow_params)
    weights = [
        flat([*trainer.model.parameters.values(), *trainer.model.masters.values()]) for trainer in (first, second)
    ]
    return rows[0] == rows[1] and torch.equal(*weights) and torch.equal(
        average, flat(second.model.ema.shadow_params)
    ), average


class Sent(TorchDispatchMode):
    """Counts the collective calls of a block by their kind and the bytes of their larger side."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor)]
            key = function.overloadpacket.__name__, max((t.nbytes for t in tensors), default=0)
            self.counts[key] = self.counts.get(key, 0) + 1
        return function(*args, **(kwargs or {}))


def sent(case, folder, world, *more):
    """({(kind, bytes): collective calls} of a step's gradient, bytes of the blocks' parameters)."""
    trainer = make_trainer(case, folder, world, *more)
    with Sent() as sending, trainer.model.ranks.averaging():
        for micro in range(trainer.config.data.accumulate):
            trainer.accumulate_gradient(0, micro)
    _, *blocks = (module for module in trainer.model.backbone.denoiser.modules() if isinstance(module, FSDPModule))
    return sending.counts, [sum(p.nbytes for p in block.parameters()) for block in blocks]


def flat(tensors):
    return torch.cat([unshard(tensor.detach()).double().flatten() for tensor in tensors])


def dropout_gradients(shard, folder, world):
    """This process's LoRA gradient under dropout, by replays and by kept graphs; its first masks."""
    gradients = []
    for recompute in ("always", "never"):
        overrides = (
            "tuning.dropout=0.3",
            f"memory.shard={shard}",
            f"memory.recompute={recompute}",
            "guidance.scale=3.0",
        )
        trainer = make_trainer("lora", folder, world, *overrides)
        with trainer.model.ranks.averaging():
            trainer.accumulate_gradient(0, 1)
        gradients.append(flat(p.grad for p in trainer.model.parameters.values()))
    return gradients


def auto_capacity(folder, world, rank):
    """The number of graphs that this process keeps, where others have memory for more."""
    trainer = make_trainer("bridge, guided", folder, world)
    trainer.recompute = Recompute("auto", budget=10**6 * (world - rank))
    trainer.step(0)
    return trainer.recompute.capacity, trainer.recompute.budget // trainer.recompute.graph_bytes


def splits_gradients(case, folder, world):
    """Whether a process has its share of the gradient, instead of all of it, between the backward passes of a step."""
    trainer = make_trainer(case, folder, world)
    with trainer.model.ranks.averaging():
        trainer.accumulate_gradient(0, 0)
        return all(p.grad is not None for p in trainer.model.parameters.values())


def starting_weights(world, rank):
    """The weights from which this process trains a network that every process has filled with its own number."""
    network = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(network.weight, rank + 1)
    accelerator = SimpleNamespace(num_processes=world, process_index=rank, device="cpu")
    Ranks(accelerator, SimpleNamespace(denoiser=network, pipe=network), MemoryConfig())
    return network.weight.tolist()


def sum_of_backward_passes(world):
    """The gradient of 256, then 8 times 1, on a bfloat16 weight, whose 8 bits would take 256 + 1 for 256."""

    class Denoiser(torch.nn.Linear):
        _no_split_modules, dtype = (), torch.bfloat16

    network = Denoiser(1, 1, bias=False).bfloat16()
    if world > 1:
        shard_weights(network, torch.device("cpu"), world).set_requires_gradient_sync(False)
    for value in (256.0, *[1.0] * 7):
        network(torch.full((1, 1), value, dtype=torch.bfloat16)).backward()
    if world > 1:
        network.set_requires_gradient_sync(True)
    network(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
    return unshard(network.weight.grad).item()


def own_loop(rank, world):
    """The gradient of a loop that wraps its network in DistributedDataParallel: all in no_sync, averaged at the end."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    wrapped = network if world == 1 else torch.nn.parallel.DistributedDataParallel(network)
    noise = torch.randn(GLOBAL_BATCH, 3, dtype=torch.float64)[
        rank * GLOBAL_BATCH // world : (rank + 1) * GLOBAL_BATCH // world
    ]
    sigmas = torch.linspace(1, 0, 7, dtype=torch.float64)
    plan = FlowBPBridge(num_active=3, alpha=0.7).plan(sigmas.numpy(), np.random.default_rng(0))
    velocity = GuidedVelocity(lambda x, sigma, conditioning: wrapped(x), {}, {}, Guidance())
    with nullcontext() if world == 1 else wrapped.no_sync():
        trajectory = rollout(velocity, noise, sigmas, plan)
        x = reward_input(plan, trajectory).requires_grad_()
        (g,) = torch.autograd.grad(x.square().sum(dim=1).mean(), x)
        backward(plan, trajectory, velocity.replay, g)
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    if world > 1:
        torch.distributed.all_reduce(gradient)
    return gradient / world


def scores(case, folder, world):
    """(scores by metric, the first images, how many chunks this process scored) of the weights that a run starts
    from.
    """
    evaluation_config = (
        f"evaluation={{prompts: {folder}/prompts.txt, samples: 5, batch_size: 2, grid: 3, num_steps: 3, watch: false, "
        "checker: null}"
    )
    trainer = make_trainer(case, folder, world, evaluation_config)
    chunks, named = [], trainer.evaluator.load()
    named["count"] = lambda images, texts: chunks.append(len(texts)) or torch.zeros(len(texts))
    trainer.evaluator.load = lambda: named
    other = {name: 2 * p.detach() for name, p in trainer.model.parameters.items()}
    trainer.evaluator.score(trainer.model, other, trainer.evaluator.samples)  # of which nothing may be left
    chunks.clear()
    found = trainer.evaluator.score(trainer.model, trainer.model.parameters, trainer.evaluator.samples)
    return {name: torch.from_numpy(column) for name, column in found.values.items()}, found.images, len(chunks)


GATHERED = ("bridge, guided", "sharded bridge")


def gathers(case, folder, world):
    """What this process gets of the gathered weights of a run that starts."""
    return gathered({"weights": dict(make_trainer(case, folder, world).model.parameters), "step": 3})


WHOLE = ("lora", "sharded lora")
WATCHED = (
    "evaluation={{prompts: {0}/prompts.txt, samples: 7, batch_size: 2, grid: 3, checker: null, every: 1, best: m, "
    "validation_samples: 4, monitors: {{m: {{name: 'ranks_worker:reward'}}}}}}"
)


def whole_run(case, folder, world):
    """The folder of a run from start to report, watched by a sentinel."""
    output = Path(folder, f"{world} whole {case}")
    trainer = make_trainer(case, folder, world, f"output={output}", "steps=2", *SHORT, WATCHED.format(folder))
    run_folder = RunFolder(output)
    run_folder.open(trainer.config)
    accelerator = trainer.model.ranks.accelerator
    accelerator.end_training = accelerator.wait_for_everyone  # other cases follow
    with patch.object(running, "as_png", return_value=b""), patch.object(pages, "as_png", return_value=b""):
        train_run(trainer, run_folder)  # a report's pictures would take longer than these runs
    return output


def watch_writes():
    """A list of the files that this process opens to write or renames from now on, which grows."""
    written = []

    def note(event, arguments):
        if event == "os.rename" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            written.append(str(arguments[0]))

    sys.addaudithook(note)
    return written


def run(rank, world, port, folder):
    """Every case, as rank `rank` of `world`; writes what it got."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(LOCAL_WORLD_SIZE="2")  # of each machine
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")  # or accelerate shares the cores out
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    for case in CASES if world == 2 else OF_FOUR:
        results[case] = train_step(case, folder, world)
    for case in taken(RESUMED, world):
        results[f"resume: {case}"] = resumes(case, folder, world)
    for case in taken(("bridge, guided", "sharded bridge"), world):
        results[f"scores: {case}"] = scores(case, folder, world)
    for shard in ("false", "true") if world == 2 else ():
        results[f"dropout, shard={shard}"] = dropout_gradients(shard, folder, world)
    results["auto capacity"] = auto_capacity(folder, world, rank)
    for case, gather in (("sharded bridge", "block"), ("sharded bridge", "rollout"), ("sharded gradients", "rollout")):
        results[f"sent: {case}, {gather}"] = sent(case, folder, world, f"memory.gather={gather}")
    for case in ("sharded bridge", "sharded gradients") if world == 2 else ():
        results[f"splits gradients: {case}"] = splits_gradients(case, folder, world)
    results["own loop"] = own_loop(rank, world)
    results["starting weights"] = starting_weights(world, rank)
    results["main work"] = []
    on_main(lambda: results["main work"].append(rank))
    results["sum of backward passes"] = sum_of_backward_passes(world)
    written = watch_writes()
    for case in taken(WHOLE, world):
        output = str(whole_run(case, folder, world))
        results[f"whole run: {case}"] = output, [path for path in written if path.startswith(output)]
    for case in taken(GATHERED, world):
        results[f"gathered: {case}"] = gathers(case, folder, world)
    torch.save(results, Path(folder, f"{world}-{rank}.pt"))
    torch.distributed.destroy_process_group()
