"""How the `shapes` model was made, from nothing, on 2 CPU cores:  python -m flowbp.shapes.recipe all --out DIR

Each stage reads what earlier ones left in DIR, and saves its result before it evaluates it:
    data      draw captions and scenes, render them
    vae       autoencoder of the renderings; its latents are whitened and cached
    flow      text encoders and transformer by flow matching, in two data-parallel processes of one thread
    scorers   reward and monitor: CLIP models of renderings and captions, with hard negatives
    export    a StableDiffusion3Pipeline folder and two CLIPModel folders in half precision, under DIR/weights
Seeds are fixed and schedules count steps, so a second run gives the same model up to the order of floating-point sums.
"""

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from ..checker import check_batch, find_objects
from ..prompts import prompts
from ..world import Object, parse
from . import models
from .captions import CATEGORIES, caption, category_of
from .scenes import render, sample_negative, sample_scene, sample_spec, true_specs
from .scenes import texts as texts_of


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules; the defaults made the shipped weights."""

    images: int = 120_000
    vae_steps: int = 2_000
    vae_batch: int = 32
    flow_steps: int = 8_000
    flow_clean_steps: int = 5_000
    flow_batch: int = 128
    flow_lr: float = 1e-3
    caption_noise: float = 0.3
    processes: int = 2
    scorer_steps: int = 5_000
    scorer_batch: int = 96
    scorer_lr: float = 1.5e-3
    shift: float = 2.0
    repeats: int = 4


SCORERS = {
    "reward": dict(width=96, patch=8, image_layers=3, text_layers=2),
    "monitor": dict(width=64, patch=4, image_layers=3, text_layers=2),
}


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] in [-1, 1], the range of the VAE and of the scorers."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def data(out: Path, recipe: Recipe) -> None:
    """DIR/images.npy uint8 [N, 32, 32, 3] and DIR/scenes.json: for each image its caption and its objects."""
    rng = np.random.default_rng(0)
    specs = [sample_spec(rng) for _ in range(recipe.images)]
    scenes = [sample_scene(spec, rng) for spec in specs]
    np.save(out / "images.npy", np.stack([render(scene, rng) for scene in scenes]))
    (out / "scenes.json").write_text(
        json.dumps([[caption(spec), scene] for spec, scene in zip(specs, scenes, strict=True)])
    )


def vae(out: Path, recipe: Recipe) -> None:
    """DIR/vae (whitened) and DIR/latents.npy float16 [N, 8, 8, 8].

    The loss is the squared error plus a small weight on the divergence from the normal prior.
    """
    images = np.load(out / "images.npy", mmap_mode="r")
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = models.build_vae()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.time()
    for step in range(recipe.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, recipe.vae_steps)
        x = to_float(images[rng.integers(len(images), size=recipe.vae_batch)])
        posterior = model.encode(x).latent_dist
        error = F.mse_loss(model.decode(posterior.sample()).sample, x)
        loss = error + 1e-4 * posterior.kl().mean() / math.prod(models.LATENT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0 or step == recipe.vae_steps - 1:
            psnr = -10 * math.log10(error.item() / 4)
            print(f"vae {step} psnr {psnr:.2f} loss {loss.item():.5f} {time.time() - started:.0f} s", flush=True)
    encode = torch.inference_mode()(lambda x: model.encode(to_float(x)).latent_dist.mode())
    models.whiten(model, torch.cat([encode(images[i : i + 500]) for i in range(0, min(len(images), 10_000), 500)]))
    model.save_pretrained(out / "vae")
    np.save(
        out / "latents.npy",
        np.concatenate([encode(images[i : i + 500]).half().numpy() for i in range(0, len(images), 500)]),
    )
    captions = [text for text, _ in json.loads((out / "scenes.json").read_text())[:1000]]
    with torch.inference_mode():
        x = to_float(images[:1000])
        y = model.decode(encode(images[:1000])).sample
    psnr, passed = -10 * math.log10(F.mse_loss(y, x).item() / 4), check_batch((y + 1) / 2, captions).mean()
    print(f"vae: psnr {psnr:.2f}, {100 * passed:.1f} % of 1000 reconstructions pass the checker", flush=True)


class Captions:
    """Captions by image index, as token ids."""

    def __init__(self, out: Path, tokenizer):
        rows = json.loads((out / "scenes.json").read_text())
        self.specs = [parse(text) for text, _ in rows]
        self.scenes = [[Object(*o) for o in scene] for _, scene in rows]
        self.ids = lru_cache(maxsize=None)(lambda text: models.tokenize(tokenizer, [text])[0])

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, 12]"""
        return torch.stack([self.ids(text) for text in texts])

    def noisy(self, index: np.ndarray, noise: float, rng: np.random.Generator) -> list[str]:
        """Captions of images, a share `noise` of them false: half of those have one wrong attribute, half are captions
        of other images.
        """
        out = []
        for i, u in zip(index, rng.random(len(index)), strict=True):
            spec = self.specs[i if u > noise / 2 else rng.integers(len(self.specs))]
            out.append(caption(sample_negative(spec, rng) if noise / 2 < u < noise else spec))
        return out


def flow(out: Path, recipe: Recipe) -> None:
    """DIR/flow.pt (weights, their moving average, optimizer, step), and flow-clean.pt at the start of the decay."""
    if recipe.processes == 1:
        _flow_worker(0, out, recipe)
    else:
        (out / "rendezvous").unlink(missing_ok=True)
        torch.multiprocessing.spawn(_flow_worker, (out, recipe), nprocs=recipe.processes)


def _flow_worker(rank: int, out: Path, recipe: Recipe) -> None:
    """Constant learning rate on true captions, then a cosine decay on captions of which a share is false.

    The first part makes the renderings clean. The second teaches what web captions teach: not to trust the text.
    """
    torch.set_num_threads(1)
    if recipe.processes > 1:
        dist.init_process_group("gloo", f"file://{out.absolute()}/rendezvous", rank=rank, world_size=recipe.processes)
    tokenizer = models.build_tokenizer()
    latents = torch.from_numpy(np.load(out / "latents.npy"))
    captions = Captions(out, tokenizer)
    torch.manual_seed(0)
    model = models.Flow(tokenizer)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.flow_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    first, batch = 0, recipe.flow_batch // recipe.processes
    if (out / "flow.pt").exists():
        state = torch.load(out / "flow.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    parallel = nn.parallel.DistributedDataParallel(model) if recipe.processes > 1 else model
    started, running = time.time(), 0.0
    for step in range(first, recipe.flow_steps):
        decay = max(0.0, (step - recipe.flow_clean_steps) / (recipe.flow_steps - recipe.flow_clean_steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.flow_lr * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * decay))
        rng = np.random.default_rng([2, step, rank])
        torch.manual_seed(step * recipe.processes + rank)
        index = rng.integers(len(latents), size=batch)
        texts = captions.noisy(index, recipe.caption_noise if decay else 0.0, rng)
        # classifier-free guidance needs the empty prompt
        texts = ["" if u < 0.1 else text for u, text in zip(rng.random(batch), texts, strict=True)]
        z = latents[index].float()
        noise, sigma = torch.randn_like(z), torch.sigmoid(torch.randn(batch))
        x = torch.lerp(z, noise, sigma[:, None, None, None])
        velocity = parallel(x, sigma, captions.tokens(texts), zeros=256 ** rng.random())
        loss = F.mse_loss(velocity, noise - z)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += 0.01 * (loss.item() - running) if running else loss.item()
        if rank:
            continue
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(0.001, 1 / (step + 2)))
        done = step + 1
        if done % 500 == 0 or done in (recipe.flow_clean_steps, recipe.flow_steps):
            print(f"flow {done} loss {running:.4f} {time.time() - started:.0f} s", flush=True)
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
            }
            torch.save(state, out / "flow.tmp")
            (out / "flow.tmp").replace(out / "flow.pt")
            if done == recipe.flow_clean_steps:
                torch.save(state, out / "flow-clean.pt")
    if recipe.processes > 1:
        dist.destroy_process_group()


def augment(images: np.ndarray, autoencoder, rng: np.random.Generator) -> torch.Tensor:
    """Renderings as a scorer sees them in training, float32 [B, 3, 32, 32]: shifted, blurred and noised. An eighth
    passes through the VAE before.
    """
    b = len(images)
    line = np.arange(images.shape[1])
    rows, cols = (np.clip(line + rng.integers(-2, 3, (b, 1)), 0, line[-1]) for _ in range(2))
    x = to_float(images[np.arange(b)[:, None, None], rows[:, :, None], cols[:, None, :]])
    with torch.no_grad():
        z = autoencoder.encode(x[: b // 8]).latent_dist.mode()
        x[: b // 8] = autoencoder.decode(z + torch.rand(len(z), 1, 1, 1) * 0.3 * torch.randn_like(z)).sample
        blur = torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < 0.5)
        x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)
        return x + torch.rand(b, 1, 1, 1) * 0.15 * torch.randn_like(x)


def scorers(out: Path, recipe: Recipe) -> None:
    """DIR/reward.pt and DIR/monitor.pt. Their seeds, widths and patches differ, so that what fools one need not fool
    the other.
    """
    for seed, (name, sizes) in enumerate(SCORERS.items(), start=1):
        scorer(out, recipe, name, seed, **sizes)


def scorer(out: Path, recipe: Recipe, name: str, seed: int, **sizes: int) -> None:
    """Contrastive training on renderings: each image against all captions of the batch and a hard negative of each.

    An image comes with any caption of the training split that is true of it. Captions of other images that may be true
    of it too are left out of its softmax. Training sees no generated image and no verdict of the checker.
    """
    tokenizer = models.build_tokenizer()
    captions = Captions(out, tokenizer)
    images = np.load(out / "images.npy", mmap_mode="r")
    autoencoder = AutoencoderKL.from_pretrained(out / "vae")
    torch.manual_seed(seed)
    model = models.build_scorer(tokenizer, **sizes)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.scorer_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    started, running = time.time(), 0.0
    steps = recipe.scorer_steps
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.scorer_lr * cosine(step, steps)
        rng = np.random.default_rng([3 + seed, step])
        index = rng.integers(len(images), size=recipe.scorer_batch)
        own, true, texts = [], [], []
        for i in index:
            specs = [spec for spec in true_specs(captions.scenes[i], 2.0) if caption(spec) in texts_of("train")]
            own.append(captions.specs[i] if rng.random() < 0.5 else specs[rng.integers(len(specs))])
            true.append(frozenset(caption(spec) for spec in true_specs(captions.scenes[i], -2.0)))
            texts += [caption(own[-1]), caption(sample_negative(own[-1], rng, true[-1]))]
        texts = list(dict.fromkeys(texts))
        place = {text: j for j, text in enumerate(texts)}
        target = torch.tensor([place[caption(spec)] for spec in own])
        x = augment(images[index], autoencoder, rng)
        image = F.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=captions.tokens(texts)).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * image @ text.T
        maybe = torch.tensor([[t in truth for t in texts] for truth in true])
        own_column = F.one_hot(target, len(texts)).bool()
        by_image = F.cross_entropy(logits.masked_fill(maybe & ~own_column, -torch.inf), target)
        columns = logits[:, target].T.masked_fill(
            maybe[:, target].T & ~torch.eye(len(index), dtype=torch.bool), -torch.inf
        )
        loss = (by_image + F.cross_entropy(columns, torch.arange(len(index)))) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(0.002, 1 / (step + 2)))
        running += 0.01 * (by_image.item() - running) if running else by_image.item()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            torch.save(average.state_dict(), out / f"{name}.pt")
            scale, seconds = model.logit_scale.exp().item(), time.time() - started
            print(
                f"{name} {step + 1} loss {running:.4f} scale {scale:.1f} {seconds:.0f} s",
                scorer_accuracy(average, tokenizer, 600),
                flush=True,
            )


@torch.inference_mode()
def scorer_accuracy(model, tokenizer, n: int, split: str = "dev") -> dict[str, float]:
    """On n new renderings of held-out captions: the share that scores higher with its caption than with a hard
    negative, in all and by category, and the AUC over all pairs.
    """
    rng = np.random.default_rng(4)
    specs = [sample_spec(rng, split) for _ in range(n)]
    scenes = [sample_scene(spec, rng) for spec in specs]
    x = to_float(np.stack([render(scene, rng) for scene in scenes]))
    true = [frozenset(caption(spec) for spec in true_specs(scene, -2.0)) for scene in scenes]
    wrong = [sample_negative(spec, rng, t, known=False) for spec, t in zip(specs, true, strict=True)]
    right_score = models.score(model, x, models.tokenize(tokenizer, [caption(spec) for spec in specs])).numpy()
    wrong_score = models.score(model, x, models.tokenize(tokenizer, [caption(spec) for spec in wrong])).numpy()
    better = right_score > wrong_score
    result = {"all": better.mean(), "auc": (right_score[:, None] > wrong_score[None]).mean()}
    for category in CATEGORIES:
        result[category] = better[[category_of(spec) == category for spec in specs]].mean()
    return {key: round(float(value), 3) for key, value in result.items()}


def pipeline(out: Path, recipe: Recipe) -> StableDiffusion3Pipeline:
    """The pipeline made of DIR/vae and the averaged weights in DIR/flow.pt."""
    tokenizer = models.build_tokenizer()
    flow = models.Flow(tokenizer)
    flow.load_state_dict(torch.load(out / "flow.pt", map_location="cpu")["average"])
    flow.transformer.set_attn_processor(JointAttnProcessor2_0())
    pipe = StableDiffusion3Pipeline(
        transformer=flow.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        vae=AutoencoderKL.from_pretrained(out / "vae"), text_encoder=flow.text_encoder, tokenizer=tokenizer,
        text_encoder_2=flow.text_encoder_2, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(out: Path, recipe: Recipe) -> None:
    """DIR/weights/{pipeline,reward,monitor} in half precision, then DIR/figures.json: the checker's pass rates on dev
    prompts.
    """
    pipe = pipeline(out, recipe)
    weights = out / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(weights / "pipeline")
    for name, sizes in SCORERS.items():
        model = models.build_scorer(pipe.tokenizer, **sizes)
        model.load_state_dict(torch.load(out / f"{name}.pt"))
        model.half().save_pretrained(weights / name)
        pipe.tokenizer.save_pretrained(weights / name)
        models.build_image_processor().save_pretrained(weights / name)
    # Weights are stored in half precision, and are to be loaded in full unless asked otherwise.
    for config in weights.glob("**/config.json"):
        fields = json.loads(config.read_text().replace('"float16"', '"float32"'))
        fields.pop("_name_or_path", None)
        config.write_text(json.dumps(fields, indent=2) + "\n")
    if recipe.repeats:
        pipe = load(weights / "pipeline")
        figures = {f"guidance {guidance}": evaluate(pipe, recipe.repeats, guidance) for guidance in (1.0, 3.0)}
        (out / "figures.json").write_text(json.dumps(figures, indent=1))
        print(json.dumps(figures, indent=1), flush=True)


def load(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a folder in float32. diffusers must be told that the folder has no T5."""
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32, **no_t5)


def sample(
    pipe: StableDiffusion3Pipeline, texts: list[str], guidance: float = 1.0, steps: int = 12, seed: int = 0
) -> np.ndarray:
    """One image a text, float32 [B, 32, 32, 3] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(texts), 96):
        call = dict(num_inference_steps=steps, guidance_scale=guidance, height=32, width=32, max_sequence_length=1)
        generator = torch.Generator().manual_seed(seed + i)
        images.append(pipe(texts[i : i + 96], generator=generator, output_type="np", **call).images)
    return np.concatenate(images)


def evaluate(
    pipe: StableDiffusion3Pipeline, repeats: int = 4, guidance: float = 1.0, split: str = "dev", **call
) -> dict[str, float]:
    """Share of samples that pass the checker, in all and by category, of `repeats` samples of each prompt of a split.

    "clean": the share of images that hold clean shapes alone, whatever the caption.
    """
    asked = prompts(split) * repeats
    images = sample(pipe, [prompt.text for prompt in asked], guidance, **call)
    passed = check_batch(images.transpose(0, 3, 1, 2), [prompt.text for prompt in asked])
    by_category = {c: passed[[p.category == c for p in asked]].mean() for c in CATEGORIES}
    clean = np.mean([find_objects(image) not in (None, []) for image in images.transpose(0, 3, 1, 2)])
    return {
        k: round(float(v), 3)
        for k, v in {"samples": len(asked), "all": passed.mean(), **by_category, "clean": clean}.items()
    }


STAGES = {"data": data, "vae": vae, "flow": flow, "scorers": scorers, "export": export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, caches and weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if args.stage in ("all", name):
            stage(args.out, Recipe())
