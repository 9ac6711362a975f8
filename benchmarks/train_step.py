"""Seconds and memory of whole training steps:  python benchmarks/train_step.py [--backbone flux.1-dev] [--json FILE]

The trainer's own step, on backbones of full size with random weights: nothing is downloaded, and no text encoder is built. Every row gives
the parts of a step (rollout, reward, sweep, update): seconds, median of --repeats steps after one for warming up, and peak memory, which
holds what lies there between steps (`at rest`: weights, optimizer). Memory is what the allocator of the GPU handed out; on a CPU it is the
resident set of this process, and sizes are tiny unless --size full is given.

mode sweep replays each active node (memory.recompute=always), mode graph keeps every node's graph (never). --active sets num_active of the
methods that have it.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))

from flowbp.backbones import BACKBONES  # noqa: E402
from flowbp.backbones.tiny import tiny_pipeline  # noqa: E402
from flowbp.config import RunConfig, build_method  # noqa: E402
from flowbp.methods import METHODS  # noqa: E402
from flowbp.performance import Phases, memory_mb  # noqa: E402
from flowbp.rewards.preprocessing import fit_short_side, normalise  # noqa: E402
from flowbp.trainer import Trainer  # noqa: E402
from flowbp_kernels.bench import machine  # noqa: E402

MODES = {"sweep": "always", "graph": "never"}
PHASES = ("rollout", "reward", "sweep", "update")
VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2, latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
KLEIN = dict(
    patch_size=1, in_channels=128, attention_head_dim=128, timestep_guidance_channels=256, mlp_ratio=3.0, axes_dims_rope=(32,) * 4,
    rope_theta=2000, eps=1e-6, guidance_embeds=False,
)  # fmt: skip
DYNAMIC_SHIFT = dict(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)


@dataclass(frozen=True)
class Architecture:
    """A pipeline without text encoders: classes of diffusers, their arguments, and the shapes of a prompt's embeddings."""

    pipeline: str
    transformer: tuple[str, dict]
    vae: tuple[str, dict]
    scheduler: dict
    text: dict[str, tuple[int, ...]]
    guidance: dict[str, float]


ARCHITECTURES = {
    "sd3.5-medium": Architecture(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )),
        ("AutoencoderKL", VAE | dict(scaling_factor=1.5305, shift_factor=0.0609)),
        dict(shift=3.0),
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
        {"scale": 3.5},
    ),
    "flux.1-dev": Architecture(
        "FluxPipeline",
        ("FluxTransformer2DModel", dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        )),
        ("AutoencoderKL", VAE | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        DYNAMIC_SHIFT,
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
        {"embedded": 3.5},
    ),
    "flux.2-klein-base-4b": Architecture(
        "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", KLEIN | dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)),
        ("AutoencoderKLFlux2", {}),
        DYNAMIC_SHIFT,
        {"encoder_hidden_states": (512, 7680)},
        {"scale": 4.0},
    ),
    "flux.2-klein-base-9b": Architecture(
        "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", KLEIN | dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)),
        ("AutoencoderKLFlux2", {}),
        DYNAMIC_SHIFT,
        {"encoder_hidden_states": (512, 12288)},
        {"scale": 4.0},
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    diffusers.utils.logging.set_verbosity_error()
    tiny = options.size == "tiny"
    report = {"machine": machine(options.device), "options": {k: v for k, v in vars(options).items() if k != "json"}, "rows": []}
    cases = itertools.product(options.backbone, options.tuning, options.checkpointing, options.method, options.active, options.mode)
    for backbone, tuning, checkpointing, method, active, mode in cases:
        takes_active = "num_active" in {field.name for field in fields(METHODS[method])}
        if not takes_active and active != options.active[0]:
            continue
        spec = {"name": method} | ({"num_active": active} if takes_active else {})
        case = {"backbone": backbone, "tuning": tuning, "checkpointing": checkpointing == "on", "method": method, "mode": mode}
        case |= {"active": active if takes_active else None}
        report["rows"].append(case | measure(backbone, spec, tuning, checkpointing == "on", MODES[mode], tiny, options))
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 180).print(table(report))


def measure(name: str, method: dict, tuning: str, checkpointing: bool, recompute: str, tiny: bool, options: argparse.Namespace) -> dict:
    """One row: seconds and peak megabytes of every phase, or where memory ran out."""
    config = run_config(name, method, tuning, checkpointing, recompute, options)
    gc.collect()
    torch.cuda.empty_cache()
    phases = Phases(memory=True)
    try:
        dtype = getattr(torch, config.backbone.dtype)
        backbone, reward = random_backbone(name, options.device, dtype, tiny), RandomReward(options.device, dtype, tiny)
        trainer = Trainer(config, backbone, reward)
        trainer.phases = phases
        trainer.step(0)
        phases.peak_mb, at_rest = {}, memory_mb()
        steps = [trainer.step(1 + i) for i in range(options.repeats)]
    except torch.OutOfMemoryError:
        return {"out_of_memory": phases.current or "models"}
    seconds = {phase: statistics.median(step[f"{phase}_seconds"] for step in steps) for phase in PHASES}
    whole = statistics.median(step["seconds"] for step in steps)
    parameters = sum(p.numel() for p in trainer.parameters.values())
    return {"step_seconds": whole, "seconds": seconds, "at_rest_mb": at_rest, "peak_mb": phases.peak_mb, "trained_parameters": parameters}


def run_config(name: str, method: dict, tuning: str, checkpointing: bool, recompute: str, options: argparse.Namespace) -> RunConfig:
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
            "memory": {"recompute": recompute, "checkpointing": checkpointing, "vae_checkpointing": checkpointing},
            "tuning": {"mode": tuning, "rank": options.rank},
            "optimizer": {"lr": 1e-5},
        }
    )


def random_backbone(name: str, device: str, dtype: torch.dtype, tiny: bool):
    """The backbone with random weights and random prompt embeddings, made on `device` in `dtype`."""
    architecture = ARCHITECTURES[name]
    if tiny:
        return BACKBONES[architecture.pipeline](tiny_pipeline(architecture.pipeline).to(device, dtype), "float32", 48)
    with made_on(device, dtype):
        transformer, vae = (getattr(diffusers, kind)(**arguments) for kind, arguments in (architecture.transformer, architecture.vae))
    parts = {"text_encoder": None, "tokenizer": None, "transformer": transformer, "vae": vae}
    pipeline = getattr(diffusers, architecture.pipeline)
    parts |= {key: None for key in ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3") if key in signature(pipeline)}
    pipe = pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler), **parts)
    backbone = BACKBONES[architecture.pipeline](pipe)
    backbone.encode = lambda prompts: {
        key: torch.randn(len(prompts), *shape, device=device, dtype=dtype) for key, shape in architecture.text.items()
    }
    return backbone


def signature(pipeline: type) -> set[str]:
    return set(pipeline._get_signature_types())


class RandomReward:
    """The image half of a CLIP ViT-H/14 (the size of HPSv2 and PickScore) with random weights; every prompt embeds as one fixed vector."""

    def __init__(self, device: str, dtype: torch.dtype, tiny: bool):
        width, layers = (32, 2) if tiny else (1280, 32)
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 16 if tiny else 16,
            image_size=56 if tiny else 224, patch_size=14, projection_dim=1024,
        )  # fmt: skip
        with made_on(device, dtype):
            self.model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
            self.text = torch.randn(1024)

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        pixels = normalise(fit_short_side(images, self.model.config.image_size)).to(self.text.dtype)
        return torch.cosine_similarity(self.model(pixels).image_embeds.float(), self.text.float(), dim=-1)


@contextmanager
def made_on(device: str, dtype: torch.dtype):
    """Modules made in the block lie on `device` in `dtype` from the first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


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
        cells = [row["backbone"], weights, row["method"], str(row["active"] or ""), row["mode"]]
        if "out_of_memory" in row:
            cells.append(f"out of memory in {row['out_of_memory']}")
        else:
            cells += [f"{value:.3g}" for value in (row["step_seconds"], *(row["seconds"][phase] for phase in PHASES))]
            cells += [f"{value / 1e3:.3g}" for value in (row["at_rest_mb"], *(row["peak_mb"][phase] for phase in PHASES))]
        shown.add_row(*cells)
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    cuda = torch.cuda.is_available()
    parser.add_argument("--backbone", nargs="+", choices=ARCHITECTURES, default=["sd3.5-medium"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["flowbp-sparse"])
    parser.add_argument("--active", nargs="+", type=int, default=[1, 2, 4, 8], metavar="K", help="active nodes (1 2 4 8)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="sweep graph (both)")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"], help="of transformer and VAE (both)")
    parser.add_argument("--size", choices=("tiny", "full"), default="full" if cuda else "tiny", help="full on a GPU, else tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (full: bfloat16, tiny: float32)")
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
