"""Seconds and memory of whole training steps:  python benchmarks/train_step.py [--backbone flux.1-dev] [--json FILE]

The step is the trainer's own, on backbones of full size with random weights: nothing is downloaded, and no text encoder
is built. Every row gives the parts of a step (rollout, reward, sweep, update): their seconds, the median of --repeats
steps after one for warming up, and their peak memory. The peak includes what lies in memory between steps (`at rest`:
weights, optimizer). On a GPU, memory is what the allocator handed out. On a CPU it is the resident set of this process,
and sizes are tiny unless --size full is given.

Mode sweep replays each active node (memory.recompute=always), mode graph keeps every node's graph (never). --active
sets num_active of the methods that have it. --apply off on takes every case without and with `flowbp_kernels.apply`,
--offload off on those with checkpointing and LoRA without and with memory.offload=blocks, and --switch with one switch
for a GPU at a time (docs/speed.md). --rounds takes the whole list of cases again, so that what is compared is
interleaved; every case of a round is a row.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_pipelines import tiny_pipeline  # noqa: E402

import flowbp_kernels  # noqa: E402
from flowbp.backbones import hasten  # noqa: E402
from flowbp.backbones.classes import BACKBONES  # noqa: E402
from flowbp.config import RunConfig, build_method  # noqa: E402
from flowbp.estimate.architectures import ARCHITECTURES, IMAGE_TOWERS, ImageTower, build_backbone  # noqa: E402
from flowbp.methods import METHODS  # noqa: E402
from flowbp.replay import proc_bytes  # noqa: E402
from flowbp.rewards.registry import weight_dtype  # noqa: E402
from flowbp.rewards.tf32 import InTF32  # noqa: E402
from flowbp.runtime.memory import Phases, peak_memory_mb  # noqa: E402
from flowbp.training.trainer import Trainer  # noqa: E402
from flowbp_kernels.bench import machine  # noqa: E402

MODES = {"sweep": "always", "graph": "never"}
PHASES = ("rollout", "reward", "sweep", "update")
# Arguments of `hasten`, and the dtype of the reward, which is otherwise that of the network. Each is compared with
# "none", but reward-tf32 with reward-float32, whose weights it has.
SWITCHES = {
    "none": {"attention": "native"},
    "attention-auto": {"attention": "auto"},
    "attention-cudnn": {"attention": "_native_cudnn"},
    "channels-last": {"attention": "native", "channels_last": True},
    "cuda-graph": {"attention": "native", "cuda_graph": True},
    "reward-float32": {"attention": "native", "reward": "float32"},
    "reward-tf32": {"attention": "native", "reward": "tf32"},
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    diffusers.utils.logging.set_verbosity_error()
    tiny = options.size == "tiny"
    report = {
        "machine": machine(options.device),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "rows": [],
    }
    cases = itertools.product(
        options.backbone,
        options.tuning,
        options.checkpointing,
        options.method,
        options.active,
        options.mode,
        options.apply,
        options.offload,
        options.switch,
    )
    for backbone, tuning, checkpointing, method, active, mode, apply, offload, switch in list(cases) * options.rounds:
        takes_active = "num_active" in {field.name for field in fields(METHODS[method])}
        if not takes_active and active != options.active[0]:
            continue
        if offload == "on" and (checkpointing, tuning) != ("on", "lora"):
            continue
        spec = {"name": method} | ({"num_active": active} if takes_active else {})
        case = {
            "backbone": backbone,
            "tuning": tuning,
            "checkpointing": checkpointing == "on",
            "method": method,
            "mode": mode,
        }
        case |= {"active": active if takes_active else None, "apply": apply == "on"}
        case |= {"offload": offload == "on", "switch": switch}
        memory = {"recompute": MODES[mode], "checkpointing": checkpointing == "on"}
        memory |= {"vae_checkpointing": checkpointing == "on", "offload": "blocks" if offload == "on" else None}
        report["rows"].append(case | measure(backbone, spec, tuning, memory, apply, switch, tiny, options))
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 180).print(table(report))


def measure(
    name: str,
    method: dict,
    tuning: str,
    memory: dict,
    apply: str,
    switch: str,
    tiny: bool,
    options: argparse.Namespace,
) -> dict:
    """One row: seconds and peak megabytes of every phase, or where memory ran out."""
    config = run_config(name, method, tuning, memory, options)
    gc.collect()
    torch.cuda.empty_cache()
    phases = MemoryPhases()
    try:
        dtype, switches = getattr(torch, config.backbone.dtype), dict(SWITCHES[switch])
        precision = switches.pop("reward", config.backbone.dtype)
        backbone = random_backbone(name, options.device, dtype, tiny)
        reward = random_reward(options.device, getattr(torch, weight_dtype(precision)), tiny)
        if apply == "on":
            flowbp_kernels.apply(backbone.denoiser)
        hasten(backbone, "off", **switches)
        trainer = Trainer(config, backbone, InTF32(reward) if precision == "tf32" else reward)
        trainer.phases = phases
        trainer.step(0)
        phases.peak_mb, at_rest = {}, memory_mb()
        steps = [trainer.step(1 + i) for i in range(options.repeats)]
    except torch.OutOfMemoryError:
        return {"out_of_memory": phases.current or "models"}
    seconds = {phase: statistics.median(step[f"{phase}_seconds"] for step in steps) for phase in PHASES}
    whole = statistics.median(step["seconds"] for step in steps)
    parameters = sum(p.numel() for p in trainer.model.parameters.values())
    return {
        "step_seconds": whole,
        "seconds": seconds,
        "at_rest_mb": at_rest,
        "peak_mb": phases.peak_mb,
        "trained_parameters": parameters,
    }


class MemoryPhases(Phases):
    """The peak megabytes of every part of a step too, and which part runs, or ran last.

    It resets the peak that the GPU's allocator (or, on Linux, the process) reports. Nobody else can read that peak
    meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.peak_mb, self.current = {}, None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.current = name
        reset_peak_memory()
        with super().__call__(name):
            yield
        self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), peak_memory_mb())


def memory_mb() -> float:
    """Memory in use now, in the unit and of the kind of `peak_memory_mb`."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return proc_bytes("self/status", "VmRSS") / 1e6


def reset_peak_memory() -> None:
    """Set the peak back to what is in use."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def run_config(name: str, method: dict, tuning: str, memory: dict, options: argparse.Namespace) -> RunConfig:
    tiny = options.size == "tiny"
    side = options.resolution or (64 if tiny else 512)
    return RunConfig.model_validate(
        {
            "output": Path(tempfile.gettempdir()) / "flowbp-train-step",  # never written
            "backbone": {"name": name, "dtype": options.dtype or ("float32" if tiny else "bfloat16")},
            "rollout": {"num_steps": options.steps, "height": side, "width": side},
            "guidance": ARCHITECTURES[name].guidance,
            "method": build_method(method),
            "reward": {"name": "clip"},
            "data": {"prompts": "shapes:train", "batch_size": options.batch, "embeddings": "live"},
            "memory": memory,
            "tuning": {"mode": tuning, "rank": options.rank},
            "optimizer": {"lr": 1e-5},
        }
    )


def random_backbone(name: str, device: str, dtype: torch.dtype, tiny: bool):
    """The backbone with random weights and random prompt embeddings, made on `device` in `dtype`."""
    if not tiny:
        return build_backbone(ARCHITECTURES[name], device, dtype)
    pipeline = ARCHITECTURES[name].pipeline
    return BACKBONES[pipeline](tiny_pipeline(pipeline).to(device, dtype), "float32", 48)


def random_reward(device: str, dtype: torch.dtype, tiny: bool) -> ImageTower:
    """The image half of a CLIP ViT-H/14, the size of HPSv2 and PickScore."""
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"patch_size": 14, "image_size": 56, "hidden_act": "gelu", "projection_dim": 1024}
    return ImageTower(CLIPVisionConfig(**sizes) if tiny else IMAGE_TOWERS["hpsv2"], device, dtype)


def table(report: dict) -> Table:
    about = report["machine"]
    title = f"{about['device']}; torch {about['versions']['torch']}; commit {about['commit']}"
    shown = Table("backbone", "weights", "method", "K", "mode", "step s", title=title)
    for phase in PHASES:
        shown.add_column(f"{phase} s", justify="right")
    for part in ("at rest", *PHASES):
        shown.add_column(f"{part} GB", justify="right")
    for row in report["rows"]:
        weights = row["tuning"] + (", checkpointed" if row["checkpointing"] else "")
        weights += (", apply" if row["apply"] else "") + (", offload" if row["offload"] else "")
        weights += "" if row["switch"] == "none" else f", {row['switch']}"
        cells = [row["backbone"], weights, row["method"], str(row["active"] or ""), row["mode"]]
        if "out_of_memory" in row:
            cells.append(f"out of memory in {row['out_of_memory']}")
        else:
            cells += [f"{value:.3g}" for value in (row["step_seconds"], *(row["seconds"][phase] for phase in PHASES))]
            cells += [
                f"{value / 1e3:.3g}" for value in (row["at_rest_mb"], *(row["peak_mb"][phase] for phase in PHASES))
            ]
        shown.add_row(*cells)
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    cuda = torch.cuda.is_available()
    parser.add_argument("--backbone", nargs="+", choices=ARCHITECTURES, default=["sd3.5-medium"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["flowbp-sparse"])
    parser.add_argument(
        "--active", nargs="+", type=int, default=[1, 2, 4, 8], metavar="K", help="active nodes (1 2 4 8)"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="sweep graph (both)")
    parser.add_argument("--apply", nargs="+", choices=("off", "on"), default=["off"], help="the fused blocks (off)")
    parser.add_argument("--offload", nargs="+", choices=("off", "on"), default=["off"], help="blocks that visit (off)")
    parser.add_argument("--switch", nargs="+", choices=SWITCHES, default=["none"], help="one for a GPU (none)")
    parser.add_argument("--rounds", type=int, default=1, help="times that the list of cases is taken (1)")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora"])
    parser.add_argument(
        "--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"], help="of transformer and VAE (both)"
    )
    parser.add_argument(
        "--size", choices=("tiny", "full"), default="full" if cuda else "tiny", help="full on a GPU, else tiny"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (full: bfloat16, tiny: float32)"
    )
    parser.add_argument("--resolution", type=int, help="pixels along each side (full: 512, tiny: 64)")
    parser.add_argument("--steps", type=int, default=25, help="rollout steps (25)")
    parser.add_argument("--batch", type=int, default=1, help="samples (1)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (16)")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed (3)")
    parser.add_argument("--json", help="file for the rows, written after each")
    options = parser.parse_args(arguments)
    options.device = "cuda" if cuda else "cpu"
    return options


if __name__ == "__main__":
    main()
