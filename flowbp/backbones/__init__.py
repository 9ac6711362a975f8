"""Backbones: diffusers pipelines behind one protocol. They know diffusers and no method.

The pipeline class that a checkpoint names in its model_index.json chooses the backbone. To add a backbone, add one file
and one line of BACKBONES.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from flowbp.backbones.base import Backbone, DiffusersBackbone, Precision, bind_velocity, check_guidance
from flowbp.backbones.flux import FluxBackbone
from flowbp.backbones.flux2 import Flux2Backbone
from flowbp.backbones.sd3 import SD3Backbone
from flowbp.backbones.zimage import ZImageBackbone
from flowbp.foreign import cut, short
from flowbp.names import nearest

__all__ = ["BACKBONES", "KNOWN_MODELS", "load_backbone", "locate"]
__all__ += ["Backbone", "DiffusersBackbone", "Precision", "bind_velocity", "check_guidance"]

BACKBONES: dict[str, type[DiffusersBackbone]] = {
    "StableDiffusion3Pipeline": SD3Backbone,
    "FluxPipeline": FluxBackbone,
    "Flux2KleinPipeline": Flux2Backbone,
    "ZImagePipeline": ZImageBackbone,
}

KNOWN_MODELS = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "flux.2-klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "z-image": "Tongyi-MAI/Z-Image",
}


def load_backbone(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    precision: Precision = "float32",
    max_sequence_length: int | None = None,
    variant: str | None = None,
) -> Backbone:
    """The backbone of `name`: "shapes" (the embedded model), a known model, a local pipeline folder, or a Hub id.

    dtype: of the weights, "float32", "bfloat16" or "float16".  precision, max_sequence_length: see `DiffusersBackbone`.
    variant: of the files, "fp16" for model.fp16.safetensors.
    Raises ValueError for an unknown name, a folder that is no pipeline, or a class without a backbone; OSError for a
    model that can be neither read nor downloaded, and for a folder without a part that its model_index.json names.
    """
    location = locate(name)
    offline = Path(location).is_dir()
    try:
        index = DiffusionPipeline.load_config(location, local_files_only=offline)
    except OSError as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise OSError(
            f"{location} is neither on this disk nor within reach ({cause}). If its page on huggingface.co asks to "
            f"accept a licence, do so and run `hf auth login`. To work offline, run `hf download {location} "
            "--local-dir FOLDER` where there is a network, and set backbone.name=FOLDER"
        ) from error
    class_name = str(index.get("_class_name"))
    if class_name not in BACKBONES:
        raise ValueError(f"no backbone for {cut(class_name)} ({location}); there is one for {', '.join(BACKBONES)}")
    # model_index.json lists a part that was left out, such as the T5 of an SD3, as [null, null].
    parts = {part: tuple(value) for part, value in index.items() if isinstance(value, (list, tuple))}
    if strange := [part for part, value in parts.items() if value[0] not in (None, "diffusers", "transformers")]:
        raise ValueError(f"{location} has code of its own for its {cut(strange[0])}, which would have to run: refused")
    absent = [part for part, value in parts.items() if value == (None, None)]
    missing = [part for part in parts if offline and part not in absent and not Path(location, part).is_dir()]
    if missing:
        raise OSError(
            f"{location} lacks the folder {missing[0]}, which its model_index.json names: download it, or, for a part "
            f'that the model does without (the T5 of an SD3), write "{missing[0]}": [null, null] there'
        )
    options = dict.fromkeys(absent) | {"dtype": getattr(torch, dtype), "local_files_only": offline, "variant": variant}
    try:
        pipe = DiffusionPipeline.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        way_out = "names such as model.fp16.safetensors need backbone.variant=fp16, others null"
        raise OSError(f"{location} cannot be read with backbone.variant={variant}: {error}; {way_out}") from error
    return BACKBONES[class_name](pipe.to(device), precision, max_sequence_length)


def locate(name: str) -> str:
    """The folder or the Hub id that `name` stands for."""
    if name == "shapes":
        from flowbp.shapes import PIPELINE

        return str(PIPELINE)
    location = KNOWN_MODELS.get(name, name)
    if not Path(location).is_dir() and "/" not in location:
        known = ("shapes", *KNOWN_MODELS)
        hint = f"{nearest(location, known)}known: {', '.join(known)}, a local folder, a Hub id owner/name"
        raise ValueError(f"unknown backbone {short(name)}; {hint}")
    if Path(location).is_dir() and not Path(location, "model_index.json").is_file():
        raise ValueError(f"{location} holds no model_index.json: pass the folder of a diffusers pipeline")
    return location
