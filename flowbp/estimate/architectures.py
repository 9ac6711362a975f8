"""Architectures of published models at full size, built without their weights: random, or none on the meta device.

Backbones come without text encoders. Of a CLIP-like reward there is the image tower. The sizes are data, in
`architectures.yaml`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from flowbp.backbones import read_index
from flowbp.backbones.base import Backbone, Precision
from flowbp.backbones.classes import BACKBONES
from flowbp.config.schema import BackboneConfig
from flowbp.given import read_data
from flowbp.guidance import Conditioning
from flowbp.rewards.preprocessing import fit_short_side, normalise


@dataclass(frozen=True)
class Architecture:
    """A pipeline of diffusers: class names with the arguments of their configs, and its usual guidance."""

    pipeline: str
    transformer: tuple[str, dict]
    vae: tuple[str, dict]
    scheduler: dict
    guidance: dict[str, float]
    text_encoders: tuple[tuple[str, dict], ...]  # of transformers
    others: dict[str, Any] = field(default_factory=dict)  # parts of the pipeline that have no weights


SIZES = read_data(__file__, "architectures.yaml")
ARCHITECTURES = {name: Architecture(**parts) for name, parts in SIZES["models"].items()}
IMAGE_TOWERS = {reward: CLIPVisionConfig(**arguments) for reward, arguments in SIZES["image_towers"].items()}


def build_backbone(
    model: Architecture, device: str, dtype: torch.dtype, precision: Precision = "float32", tokens: int | None = None
) -> Backbone:
    """The backbone with random weights (none on "meta") and without text encoders; prompts embed as random numbers."""
    if model.pipeline not in BACKBONES:
        raise ValueError(f"no backbone for {model.pipeline}; there is one for {', '.join(BACKBONES)}")
    pipeline = getattr(diffusers, model.pipeline)
    texts = [part for part in pipeline._get_signature_types() if part.startswith(("text_encoder", "tokenizer"))]
    parts: dict[str, Any] = dict.fromkeys(texts) | model.others
    with local_torch_dtype(dtype), torch.device(device):
        for part, (kind, sizes) in {"transformer": model.transformer, "vae": model.vae}.items():
            parts[part] = getattr(diffusers, kind).from_config(sizes).to(dtype)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler)
    backbone = BACKBONES[model.pipeline](pipeline(**parts), precision, tokens)
    backbone.encode = partial(random_embeddings, backbone)
    return backbone


def read_backbone(options: BackboneConfig) -> tuple[Backbone, list[PreTrainedModel]]:
    """(the backbone that `options` names, its text encoders), both on the meta device, from config files alone.

    Raises ValueError for an unknown name, OSError for a model out of reach.
    """
    model, dtype = read_architecture(options.name), getattr(torch, options.dtype)
    with local_torch_dtype(dtype), torch.device("meta"):
        kinds = [(getattr(transformers, kind), sizes) for kind, sizes in model.text_encoders]
        encoders = [kind(kind.config_class(**sizes)).eval() for kind, sizes in kinds]
    return build_backbone(model, "meta", dtype, options.precision, options.max_sequence_length), encoders


def read_architecture(name: str) -> Architecture:
    """The architecture of a model, from its config files or, if these are not on this disk, from ARCHITECTURES."""
    known = name in ARCHITECTURES
    try:
        location, index = read_index(name, offline=known)
    except OSError as error:
        if known:
            return ARCHITECTURES[name]
        way_out = f"pass a model whose architecture is known offline: {', '.join(ARCHITECTURES)}"
        raise OSError(f"{error}; or {way_out}") from error
    here = {"local_files_only": known or Path(location).is_dir()}

    def part(name: str) -> tuple[str, dict]:
        """(class, config) of a part of the pipeline."""
        kind, at = index[name][1], here | {"subfolder": name}
        if name.startswith("text_encoder"):
            return kind, transformers.AutoConfig.from_pretrained(location, **at).to_dict()
        return kind, getattr(diffusers, kind).load_config(location, **at)

    others = {"is_distilled": index["is_distilled"]} if "is_distilled" in index else {}
    if index.get("tokenizer", [None, None])[1]:
        others["tokenizer"] = transformers.AutoTokenizer.from_pretrained(location, subfolder="tokenizer", **here)
    encoders = tuple(part(name) for name in index if name.startswith("text_encoder") and index[name][1])
    pipeline, scheduler = str(index.get("_class_name")), part("scheduler")[1]
    return Architecture(pipeline, part("transformer"), part("vae"), scheduler, {}, encoders, others)


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


class ImageTower:
    """A reward of a CLIP image tower with random weights; every prompt embeds as one fixed vector."""

    def __init__(self, config: CLIPVisionConfig, device: str, dtype: torch.dtype):
        with local_torch_dtype(dtype), torch.device(device):
            self.model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
            self.text = torch.randn(config.projection_dim)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalise(fit_short_side(images, self.model.config.image_size)).to(self.text.dtype)
        return F.cosine_similarity(self.model(pixels).image_embeds.float(), self.text.float(), dim=-1)
