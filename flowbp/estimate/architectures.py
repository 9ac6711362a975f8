"""Architectures of published models at full size, built without their weights: random, or none on the meta device.

Backbones come without text encoders. Of a CLIP-like reward there is the image tower. The sizes are data, in
`architectures.yaml`.
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
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PretrainedConfig, PreTrainedModel

from flowbp.backbones import BACKBONES, Backbone, Precision, locate
from flowbp.config import BackboneConfig
from flowbp.guidance import Conditioning
from flowbp.rewards.preprocessing import fit_short_side, normalise

__all__ = ["ARCHITECTURES", "IMAGE_TOWERS", "ImageTower", "build_backbone", "image_tower", "read_backbone"]


@dataclass(frozen=True)
class Architecture:
    """A pipeline of diffusers: class names with the arguments of their configs, and its usual guidance."""

    pipeline: str
    transformer: tuple[str, dict]
    vae: tuple[str, dict]
    scheduler: dict
    guidance: dict[str, float]
    text_encoders: tuple[tuple[str, dict], ...]  # of transformers


SIZES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
ARCHITECTURES = {name: Architecture(**parts) for name, parts in SIZES["models"].items()}
IMAGE_TOWERS = {reward: CLIPVisionConfig(**arguments) for reward, arguments in SIZES["image_towers"].items()}


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
    model: Architecture, device: str, dtype: torch.dtype, precision: Precision = "float32", tokens: int | None = None
) -> Backbone:
    """The backbone with random weights (none on "meta") and random prompt embeddings of full length."""
    with made_on(device, dtype):
        kinds = {"transformer": model.transformer, "vae": model.vae}
        parts = {part: getattr(diffusers, kind)(**sizes).to(dtype) for part, (kind, sizes) in kinds.items()}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**model.scheduler)
    return assemble(model.pipeline, parts, precision, tokens)


def read_backbone(options: BackboneConfig) -> tuple[Backbone, list[PreTrainedModel]]:
    """(the backbone that `options` names, its text encoders), both on the meta device, from config files alone.

    A model of ARCHITECTURES that is not on this disk is built from there. Raises ValueError for an unknown name,
    OSError for a model out of reach.
    """
    location, dtype, known = locate(options.name), getattr(torch, options.dtype), ARCHITECTURES.get(options.name)
    here = {"local_files_only": known is not None or Path(location).is_dir()}
    try:
        # diffusers hands the Hub a deprecated option
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            index = DiffusionPipeline.load_config(location, **here)
    except OSError as error:
        if known is not None:
            encoders = [(kind, getattr(transformers, kind).config_class(**size)) for kind, size in known.text_encoders]
            backbone = build_backbone(known, "meta", dtype, options.precision, options.max_sequence_length)
            return backbone, text_encoders(encoders, dtype)
        cause = str(error).splitlines()[0].rstrip(".")
        raise OSError(
            f"the config files of {location} are neither on this disk nor within reach ({cause}): pass the folder of a "
            f"diffusers pipeline, or a model whose architecture is known offline: {', '.join(ARCHITECTURES)}"
        ) from error
    parts = {}
    with made_on("meta", dtype):
        for part in ("transformer", "vae"):
            kind = getattr(diffusers, index[part][1])
            parts[part] = kind.from_config(kind.load_config(location, subfolder=part, **here)).to(dtype)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(location, subfolder="scheduler", **here)
    if index.get("tokenizer", [None, None])[1]:
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(location, subfolder="tokenizer", **here)
    if "is_distilled" in index:
        parts["is_distilled"] = index["is_distilled"]
    configs = [
        (index[part][1], transformers.AutoConfig.from_pretrained(location, subfolder=part, **here))
        for part in index
        if part.startswith("text_encoder") and index[part][1]
    ]
    backbone = assemble(index["_class_name"], parts, options.precision, options.max_sequence_length)
    return backbone, text_encoders(configs, dtype)


def text_encoders(configs: Iterable[tuple[str, PretrainedConfig]], dtype: torch.dtype) -> list[PreTrainedModel]:
    """Models of (class, config) on the meta device."""
    with made_on("meta", dtype):
        return [getattr(transformers, kind)(config).eval() for kind, config in configs]


def assemble(pipeline: str, parts: dict[str, Any], precision: Precision, max_sequence_length: int | None) -> Backbone:
    """The backbone of a pipeline class that has `parts` and no text encoders; prompts embed as random numbers."""
    if pipeline not in BACKBONES:
        raise ValueError(f"no backbone for {pipeline}; there is one for {', '.join(BACKBONES)}")
    kind = getattr(diffusers, pipeline)
    left_out = {part: None for part in kind._get_signature_types() if part.startswith(("text_encoder", "tokenizer"))}
    backbone = BACKBONES[pipeline](kind(**left_out | parts), precision, max_sequence_length)
    backbone.encode = partial(random_embeddings, backbone)
    return backbone


def random_embeddings(backbone: Backbone, prompts: list[str]) -> Conditioning:
    """Random conditioning in the shapes that the backbone's prompts have.

    An entry without axes of its own counts tokens: its [B] integers lie on the CPU and say the full length.
    """
    shapes, rows = backbone.prompt_shapes, len(prompts)
    at = {"device": next(backbone.denoiser.parameters()).device, "dtype": backbone.denoiser.dtype}
    return {
        name: torch.randn(rows, *shape, **at) if shape else torch.full((rows,), shapes["embeds"][0])
        for name, shape in shapes.items()
    }


def image_tower(width: int, layers: int, heads: int, patch: int, size: int, projection: int) -> dict:
    """The arguments of a `CLIPVisionConfig`."""
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        patch_size=patch, image_size=size, hidden_act="gelu", projection_dim=projection,
    )  # fmt: skip


class ImageTower:
    """A reward of a CLIP image tower with random weights; every prompt embeds as one fixed vector."""

    def __init__(self, config: CLIPVisionConfig, device: str, dtype: torch.dtype):
        with made_on(device, dtype):
            self.model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
            self.text = torch.randn(config.projection_dim)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalise(fit_short_side(images, self.model.config.image_size)).to(self.text.dtype)
        return F.cosine_similarity(self.model(pixels).image_embeds.float(), self.text.float(), dim=-1)
