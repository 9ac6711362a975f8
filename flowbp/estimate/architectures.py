"""Architectures of published models at full size, to build without their weights: with random ones, or with none on the
meta device.

Backbones without text encoders, and the image towers of the CLIP-like rewards. Numbers are those of the published
config.json files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PretrainedConfig, PreTrainedModel

from flowbp.backbones import BACKBONES, Backbone, Precision, locate
from flowbp.guidance import Conditioning
from flowbp.rewards.preprocessing import fit_short_side, normalise

__all__ = [
    "ARCHITECTURES",
    "IMAGE_TOWERS",
    "Architecture",
    "ImageTower",
    "build_backbone",
    "image_tower",
    "made_on",
    "read_backbone",
]

VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2, latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
SD35 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048, qk_norm="rms_norm",
)  # fmt: skip
KLEIN = dict(
    patch_size=1, in_channels=128, attention_head_dim=128, timestep_guidance_channels=256, mlp_ratio=3.0,
    axes_dims_rope=(32,) * 4,
    rope_theta=2000, eps=1e-6, guidance_embeds=False,
)  # fmt: skip
DYNAMIC_SHIFT = dict(
    use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
)

# text encoders: class of transformers, arguments of its config
T5_XXL = ("T5EncoderModel", dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
))  # fmt: skip
CLIP_L = ("CLIPTextModel", dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
CLIP_L_PROJECTED = ("CLIPTextModelWithProjection", CLIP_L[1] | dict(projection_dim=768))
CLIP_G = ("CLIPTextModelWithProjection", dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
))  # fmt: skip
QWEN3 = dict(vocab_size=151936, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
QWEN3_4B = QWEN3 | dict(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True)
QWEN3_8B = QWEN3 | dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)

SD35_REST = (  # vae, scheduler, guidance, text encoders
    ("AutoencoderKL", VAE | dict(scaling_factor=1.5305, shift_factor=0.0609)),
    dict(shift=3.0),
    {"scale": 3.5},
    (CLIP_L_PROJECTED, CLIP_G, T5_XXL),
)


@dataclass(frozen=True)
class Architecture:
    """A pipeline of diffusers: classes and their arguments, and its usual guidance."""

    pipeline: str
    transformer: tuple[str, dict]
    vae: tuple[str, dict]
    scheduler: dict
    guidance: dict[str, float]
    text_encoders: tuple[tuple[str, dict], ...]  # of transformers


ARCHITECTURES = {
    "sd3.5-medium": Architecture(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", SD35 | dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        )),
        *SD35_REST,
    ),
    "sd3.5-large": Architecture(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", SD35 | dict(
            num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
        )),
        *SD35_REST,
    ),
    "flux.1-dev": Architecture(
        "FluxPipeline",
        ("FluxTransformer2DModel", dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        )),
        ("AutoencoderKL", VAE | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        DYNAMIC_SHIFT,
        {"embedded": 3.5},
        (CLIP_L, T5_XXL),
    ),
    "flux.2-klein-base-4b": Architecture(
        "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", KLEIN | dict(num_layers=5, num_single_layers=20, num_attention_heads=24,
        joint_attention_dim=7680)),
        ("AutoencoderKLFlux2", {}),
        DYNAMIC_SHIFT,
        {"scale": 4.0},
        (("Qwen3ForCausalLM", QWEN3_4B),),
    ),
    "flux.2-klein-base-9b": Architecture(
        "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", KLEIN | dict(num_layers=8, num_single_layers=24, num_attention_heads=32,
        joint_attention_dim=12288)),
        ("AutoencoderKLFlux2", {}),
        DYNAMIC_SHIFT,
        {"scale": 4.0},
        (("Qwen3ForCausalLM", QWEN3_8B),),
    ),
    "z-image": Architecture(
        "ZImagePipeline",
        ("ZImageTransformer2DModel", {}),
        ("AutoencoderKL", VAE | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        dict(shift=3.0),
        {"scale": 5.0},
        (("Qwen3Model", QWEN3_4B),),
    ),
}  # fmt: skip


def image_tower(
    width: int, layers: int, heads: int, patch: int, size: int = 224, activation: str = "gelu", projection: int = 512
) -> dict:
    """The arguments of a `CLIPVisionConfig`."""
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        patch_size=patch,
        image_size=size, hidden_act=activation, projection_dim=projection,
    )  # fmt: skip


VIT_L, VIT_H = (
    image_tower(1024, 24, 16, 14, activation="quick_gelu", projection=768),
    image_tower(1280, 32, 16, 14, projection=1024),
)
IMAGE_TOWERS = {  # by reward
    name: CLIPVisionConfig(**arguments)
    for name, arguments in {
        "clip": VIT_L,
        "aesthetic": VIT_L,
        "pickscore": VIT_H,
        "hpsv2": VIT_H,
        "imagereward": image_tower(1024, 24, 16, 16),
    }.items()
}


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made in the block lie on `device` in `dtype` from the first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_backbone(
    architecture: Architecture,
    device: str,
    dtype: torch.dtype,
    precision: Precision = "float32",
    max_sequence_length: int | None = None,
) -> Backbone:
    """The backbone with random weights (none on "meta") and random prompt embeddings of full length."""
    with made_on(device, dtype):
        transformer, vae = (
            getattr(diffusers, kind)(**arguments) for kind, arguments in (architecture.transformer, architecture.vae)
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler)
    parts = {"transformer": transformer.to(dtype), "vae": vae.to(dtype), "scheduler": scheduler}
    return assemble(architecture.pipeline, parts, precision, max_sequence_length)


def read_backbone(
    name: str, dtype: torch.dtype, precision: Precision = "float32", max_sequence_length: int | None = None
) -> tuple[Backbone, list[PreTrainedModel]]:
    """(the backbone of `name`, its text encoders), both on the meta device, from config files: no weights are read.

    A model of ARCHITECTURES that is not on this disk is built from there. Raises ValueError for an unknown name,
    OSError for a model out of reach.
    """
    location, known = locate(name), name in ARCHITECTURES
    here = {"local_files_only": known or Path(location).is_dir()}
    try:
        with warnings.catch_warnings(
            action="ignore", category=UserWarning
        ):  # diffusers hands the Hub a deprecated option
            index = diffusers.DiffusionPipeline.load_config(location, **here)
    except OSError as error:
        if known:
            architecture = ARCHITECTURES[name]
            configs = [(kind, text_config(kind, arguments)) for kind, arguments in architecture.text_encoders]
            return build_backbone(architecture, "meta", dtype, precision, max_sequence_length), text_encoders(
                configs, dtype
            )
        cause = str(error).splitlines()[0].rstrip(".")
        raise OSError(
            f"the config files of {location} are neither on this disk nor within reach ({cause}): pass the folder of a "
            "diffusers pipeline, "
            f"or a model whose architecture is known offline: {', '.join(ARCHITECTURES)}"
        ) from error
    parts = {}
    with made_on("meta", dtype):
        for part in ("transformer", "vae"):
            kind = getattr(diffusers, index[part][1])
            parts[part] = kind.from_config(kind.load_config(location, subfolder=part, **here)).to(dtype)
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        location, subfolder="scheduler", **here
    )
    if index.get("tokenizer", [None, None])[1]:
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(location, subfolder="tokenizer", **here)
    flags = {"is_distilled": index["is_distilled"]} if "is_distilled" in index else {}
    encoders = {part: index[part][1] for part in index if part.startswith("text_encoder") and index[part][1]}
    configs = [
        (kind, transformers.AutoConfig.from_pretrained(location, subfolder=part, **here))
        for part, kind in encoders.items()
    ]
    return assemble(index["_class_name"], parts | flags, precision, max_sequence_length), text_encoders(configs, dtype)


def text_config(kind: str, arguments: dict) -> PretrainedConfig:
    return getattr(transformers, kind).config_class(**arguments)


def text_encoders(configs: Iterable[tuple[str, PretrainedConfig]], dtype: torch.dtype) -> list[PreTrainedModel]:
    """Models of (class, config) on the meta device."""
    with made_on("meta", dtype):
        return [getattr(transformers, kind)(config).eval() for kind, config in configs]


def assemble(pipeline: str, parts: dict[str, Any], precision: Precision, max_sequence_length: int | None) -> Backbone:
    """The backbone of a pipeline class without its other parts; prompts embed as random numbers."""
    if pipeline not in BACKBONES:
        raise ValueError(f"no backbone for {pipeline}; there is one for {', '.join(BACKBONES)}")
    kind = getattr(diffusers, pipeline)
    left_out = {part: None for part in kind._get_signature_types() if part.startswith(("text_encoder", "tokenizer"))}
    backbone = BACKBONES[pipeline](kind(**left_out | parts), precision, max_sequence_length)
    backbone.encode = partial(random_embeddings, backbone)
    return backbone


def random_embeddings(backbone: Backbone, prompts: list[str]) -> Conditioning:
    """Conditioning of the shapes of `prompts`' own. What counts tokens, [B] integers without further axes, lies on the
    CPU.
    """
    shapes, like = backbone.prompt_shapes, next(backbone.denoiser.parameters())
    return {
        name: torch.randn(len(prompts), *shape, device=like.device, dtype=backbone.denoiser.dtype)
        if shape
        else torch.full((len(prompts),), shapes["embeds"][0])
        for name, shape in shapes.items()
    }


class ImageTower:
    """A reward of a CLIP image tower with random weights; every prompt embeds as one fixed vector."""

    def __init__(self, config: CLIPVisionConfig, device: str, dtype: torch.dtype):
        with made_on(device, dtype):
            self.model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
            self.text = torch.randn(config.projection_dim)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalise(fit_short_side(images, self.model.config.image_size)).to(self.text.dtype)
        return F.cosine_similarity(self.model(pixels).image_embeds.float(), self.text.float(), dim=-1)
