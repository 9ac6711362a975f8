"""Training steps of SD3.5-medium at full size on a CPU, and what `flowbp estimate` says of their memory.

The pipeline is written to --folder as `from_pretrained` reads it: the published architecture with random weights in
bfloat16, without T5, and a CLIP model as the reward (8 GB of disk). Then every case is a process of its own, which does
what `flowbp train` does: it loads the folder, embeds the prompts, and takes one step (256 px, LoRA, 4 rollout steps,
K replayed nodes). Of each part of the step it reports

    live bytes   of all tensors, the most at once (`LiveBytes`)
    resident     bytes of the process, the most at once, less those before anything was loaded

Live bytes are those of the device: without what `memory.offload` keeps in CPU memory, which is resident here too.
Before the step, the optimizer's moments are made by a step of rate 0. The case `loading` loads the pipeline alone.

    python benchmarks/full_size.py --folder FOLDER --json docs/full_size.json

A case takes minutes on two cores. It is kept in the JSON file when it ends, and is not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from transformers.modeling_utils import local_torch_dtype

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from live_phases import LivePhases, at_home, held  # noqa: E402
from tiny_pipelines import clip_tokenizer  # noqa: E402

from flowbp.backbones import load_backbone  # noqa: E402
from flowbp.config import load  # noqa: E402
from flowbp.estimate.architectures import ARCHITECTURES  # noqa: E402
from flowbp.estimate.estimate import estimate  # noqa: E402
from flowbp.replay import proc_bytes  # noqa: E402
from flowbp.runtime.environment import environment  # noqa: E402
from flowbp.training.trainer import Trainer  # noqa: E402
from flowbp_kernels.live_bytes import LiveBytes  # noqa: E402

WAYS = {
    "plain": [],
    "checkpointed": ["memory.checkpointing=true"],
    "int8": ["memory.checkpointing=true", "backbone.quantise.weights=int8"],
    "offloaded": ["memory.checkpointing=true", "memory.offload=blocks"],
}
CASES = {"loading": []} | {
    f"{way}, K = {active}": [f"method.num_active={active}", *overrides]
    for active in (1, 4)
    for way, overrides in WAYS.items()
}
PARTS = ("rollout", "reward", "sweep", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["write", *CASES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder)))
        return

    found = {"environment": environment(), "rows": []}
    if arguments.json and arguments.json.is_file():
        found["rows"] = json.loads(arguments.json.read_text())["rows"]
    if not (arguments.folder / "prompts.txt").is_file():  # which is written last
        run("write", arguments.folder)
    for name in arguments.cases:
        if all(row["case"] != name for row in found["rows"]):
            found["rows"].append({"case": name, **run(name, arguments.folder)})
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))


def run(name: str, folder: Path) -> dict:
    """What a process of its own says of the case."""
    command = [sys.executable, __file__, "--folder", str(folder), "--child", name]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def child(name: str, folder: Path) -> dict:
    if name == "write":
        return write(folder)
    return step(folder, CASES[name]) if CASES[name] else loading(folder)


# -- the folder --------------------------------------------------------------------------------------------------------


def write(folder: Path) -> dict:
    """The pipeline, the reward and the prompts."""
    model, tokenizer = ARCHITECTURES["sd3.5-medium"], clip_tokenizer()
    with local_torch_dtype(torch.bfloat16):
        parts = {
            part: getattr(diffusers, kind).from_config(sizes).to(torch.bfloat16)
            for part, (kind, sizes) in {"transformer": model.transformer, "vae": model.vae}.items()
        }
        for part, (kind, sizes) in zip(("text_encoder", "text_encoder_2"), model.text_encoders[:2], strict=True):
            encoder = getattr(transformers, kind)
            parts[part] = encoder(encoder.config_class(**sizes))
        clip = transformers.CLIPModel(transformers.CLIPConfig(**LARGE_CLIP))
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_config(model.scheduler)
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": None, "text_encoder_3": None}
    diffusers.StableDiffusion3Pipeline(**parts, **tokenizers).save_pretrained(folder / "pipeline")
    for part in (clip, tokenizer, transformers.CLIPImageProcessor()):
        part.save_pretrained(folder / "reward")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return {}


# ViT-L/14, the model of CLIPScore and of the aesthetic predictor.
LARGE_CLIP = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


# -- the cases ---------------------------------------------------------------------------------------------------------


def loading(folder: Path) -> dict:
    """The bytes of the pipeline's weights, and the peak of loading them and of reading each once: files are mapped, so
    that a page is resident when it is read.
    """
    before = resident(peak=False)
    reset_peak()
    backbone = load_backbone(str(folder / "pipeline"), dtype="bfloat16")
    modules = [part for part in backbone.pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [t.detach() for module in modules for t in (*module.parameters(), *module.buffers())]
    loaded = resident() - before
    for t in tensors:
        t.sum()
    weights, peak = sum(t.nbytes for t in tensors), resident() - before
    return {"weights": weights, "loaded": loaded, "resident": peak, "ratio": peak / weights}


def step(folder: Path, overrides: list[str]) -> dict:
    """Measured and estimated bytes of each part of a step."""
    before = resident(peak=False)
    config = load("sd3.5-medium/flowbp-sparse", [*settings(folder), *overrides])
    trainer = Trainer(config)
    trainer.optimizer.param_groups[0]["foreach"] = True  # as on a GPU
    make_moments(trainer)
    gc.collect()
    with LiveBytes(held(trainer)) as live:
        trainer.phases = ResidentPhases(live, before)
        logged = trainer.step(0)
    predicted, measured = estimate(config), trainer.phases
    home = at_home(trainer.model.backbone.denoiser) if config.memory.offload else 0
    parts = {
        part: {
            "estimated": predicted.peaks[part],
            "live": measured.peaks[part] - home,
            "resident": measured.resident[part],
            "seconds": logged[f"{part}_seconds"],
        }
        for part in PARTS
    }
    return {"overrides": overrides, "parts": parts, "replays": len(set(logged["nodes"]))}


def settings(folder: Path) -> list[str]:
    size = ["rollout.num_steps=4", "rollout.height=256", "rollout.width=256", "data.batch_size=1", "plans=shared"]
    memory = ["memory.shard=false", "memory.shard_gradients=false", "memory.checkpointing=false"]
    reward = f"reward={{name: clip, model: {folder / 'reward'}, dtype: bfloat16}}"
    data = [f"data.prompts={folder / 'prompts.txt'}", f"data.cache={folder / 'cache'}", f"output={folder / 'run'}"]
    lora = ["tuning={mode: lora, rank: 32}", "evaluation=null", "backbone.max_sequence_length=77"]
    return [f"backbone.name={folder / 'pipeline'}", *size, *memory, reward, *data, *lora]


def make_moments(trainer: Trainer) -> None:
    """Let the optimizer make its state, by a step of rate 0."""
    for p in trainer.model.masters.values():
        p.grad = torch.zeros_like(p)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


class ResidentPhases(LivePhases):
    """The most resident bytes in each part of a step too."""

    def __init__(self, live: LiveBytes, before: int):
        super().__init__(live)
        self.before, self.resident = before, {}

    @contextmanager
    def __call__(self, name):
        reset_peak()
        with super().__call__(name):
            yield
        self.resident[name] = resident() - self.before


def resident(peak: bool = True) -> int:
    """Resident bytes of this process, the most since `reset_peak` or those of now."""
    return proc_bytes("self/status", "VmHWM" if peak else "VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def table(rows: list[dict]) -> str:
    """Markdown: a row a case and part; estimated, live and resident GB, and the first over the second."""
    lines = ["| | part | estimated | live | estimated / live | resident |", "|---|---|---|---|---|---|"]
    for name in CASES:
        parts = next((row["parts"] for row in rows if row["case"] == name and "parts" in row), {})
        for part, sizes in parts.items():
            estimated, live, process = (f"{sizes[key] / 1e9:.2f}" for key in ("estimated", "live", "resident"))
            ratio = sizes["estimated"] / sizes["live"]
            case = name if part == PARTS[0] else ""
            lines.append(f"| {case} | {part} | {estimated} | {live} | {ratio:.3f} | {process} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
