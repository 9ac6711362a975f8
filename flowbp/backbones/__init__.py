"""Backbones: diffusers pipelines behind one class. They know diffusers and no method.

The pipeline class that a checkpoint names in its model_index.json chooses the backbone (`classes`). diffusers takes
seconds to import, so what needs it is loaded when it is first used.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp import log
from flowbp.given import cut, nearest, read_data, read_text, short
from flowbp.shapes import PIPELINE

if TYPE_CHECKING:
    from flowbp.backbones.base import Backbone, Precision

# What libraries say that asks for nothing: of parts that nothing here calls, when diffusers imports them, and of LoRAs
# of text encoders, which are never tuned. Logger -> a part of its messages.
HARMLESS = {
    "diffusers.loaders.peft": "No LoRA keys associated to CLIPText",
    "diffusers.loaders.lora_base": "No LoRA keys associated to CLIPText",
    "diffusers.models.modeling_utils": "should be kept in float32: []",
    "transformers.utils.import_utils": "torchvision",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load",
}
for logger, text in HARMLESS.items():
    logging.getLogger(logger).addFilter(lambda said, text=text: text not in said.getMessage())

ABSENT = [None, None]
QUANTISERS = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}  # the library of each format
KNOWN_MODELS: dict[str, str] = read_data(__file__, "published.yaml")


def load_backbone(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    precision: "Precision" = "float32",
    max_sequence_length: int | None = None,
    variant: str | None = None,
    kernels: str = "off",
    quantise: Mapping[str, str | None] | None = None,
    attention: str = "auto",
    vae_channels_last: bool = False,
    cuda_graph: bool = False,
) -> "Backbone":
    """The backbone of `name`: "shapes" (the embedded model), a known model, a local pipeline folder, or a Hub id.

    dtype: of the weights, "float32", "bfloat16" or "float16".  precision, max_sequence_length: see `Backbone`.
    variant: of the files, "fp16" for model.fp16.safetensors.
    quantise: {"weights": FORMAT, "text_encoders": FORMAT} holds frozen weights in fewer bits
    (`flowbp.backbones.quantise`). FORMAT is "nf4", "int8", "float8" or None.
    kernels, attention, vae_channels_last, cuda_graph: see `hasten`.
    Raises ValueError for an unknown name, a folder that is no pipeline, a class without a backbone or without CUDA
    graphs, and a format or a kernel whose library is missing; OSError for a model that can be neither read nor
    downloaded, and for a folder without a part that its model_index.json names.
    """
    check_quantiser(quantise)
    location, index = read_index(name)
    import torch
    from diffusers import DiffusionPipeline

    from flowbp.backbones.classes import BACKBONES

    class_name, offline = index["_class_name"], Path(location).is_dir()
    if (kind := BACKBONES.get(class_name)) is None:
        raise ValueError(f"no backbone for {cut(class_name)} ({location}); there is one for {', '.join(BACKBONES)}")
    check_switches(class_name, attention, cuda_graph)
    options = {part: None for part, value in index.items() if value == ABSENT}
    options |= {"dtype": getattr(torch, dtype), "local_files_only": offline, "variant": variant}
    try:
        with without_bars():
            pipe = DiffusionPipeline.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        way_out = "names such as model.fp16.safetensors need backbone.variant=fp16, others null"
        raise OSError(f"{location} cannot be read with backbone.variant={variant}: {error}; {way_out}") from error
    if quantise is not None:
        from flowbp.backbones.quantise import quantise_pipeline

        quantise_pipeline(pipe, **quantise)
    backbone = kind(pipe.to(device), precision, max_sequence_length)
    return hasten(backbone, kernels, attention, vae_channels_last, cuda_graph)


def hasten(
    backbone: "Backbone", kernels: str, attention: str = "auto", channels_last: bool = False, cuda_graph: bool = False
) -> "Backbone":
    """Turn on what makes a backbone faster, in place. Returns it.

    kernels: "auto" calls flowbp_kernels.apply on the transformer, or logs why it refuses; "off" leaves it to diffusers.
    attention: the kernel of the transformer's attention; see `flowbp_kernels.set_attention`.
    channels_last: the VAE's decoder holds its weights, and so computes, in that memory format.
    cuda_graph: passes without gradient, those of rollouts and evaluation, are a `flowbp_kernels.GraphedForward`.
    """
    import torch

    from flowbp_kernels import GraphedForward, apply, set_attention

    if kernels == "auto":
        try:
            log.info("backbone.kernels=auto: %r", apply(backbone.denoiser))
        except ValueError as error:
            log.warning("backbone.kernels=auto: the transformer stays as it is: %s", error)
    set_attention(backbone.denoiser, attention)
    if channels_last:
        backbone.pipe.vae.decoder.to(memory_format=torch.channels_last)
    if cuda_graph and not torch.cuda.is_available():
        log.warning("backbone.cuda_graph=true has no effect: torch sees no CUDA device")
    if cuda_graph:
        backbone.velocity = GraphedForward(backbone.velocity)
    return backbone


def check_switches(class_name: str, attention: str, cuda_graph: bool) -> None:
    """Raise ValueError for an attention kernel, or a CUDA graph, that pipelines of the class do not take."""
    if attention in ("auto", "native") and not cuda_graph:
        return  # as most do, without an import of diffusers
    from flowbp.backbones.classes import BACKBONES
    from flowbp_kernels.attention import check_attention

    if (kind := BACKBONES.get(class_name)) is None:
        return
    check_attention(attention, kind.dispatches_attention)
    if cuda_graph and not kind.capturable:
        raise ValueError(f"shapes in {class_name} depend on the lengths of prompts: set backbone.cuda_graph=false")


def check_quantiser(quantise: Mapping[str, str | None] | None) -> None:
    """Raise ValueError for an unknown format, and for one whose library is not installed."""
    for part, kind in (quantise or {}).items():
        if kind is not None and kind not in QUANTISERS:
            raise ValueError(f"backbone.quantise.{part} is {short(kind)}; known: {', '.join(QUANTISERS)}, null")
        if kind is not None and find_spec(library := QUANTISERS[kind]) is None:
            raise ValueError(f'backbone.quantise.{part}={kind} needs {library}: pip install "flowbp[quantise]"')


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the bars of diffusers and transformers, one for each part of a pipeline, during the block."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    with ExitStack() as after:
        for bars in (of_diffusers, of_transformers):
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                after.callback(bars.enable_progress_bar)
        yield


def read_index(name: str, offline: bool = False) -> tuple[str, dict[str, Any]]:
    """(where the model of `name` is, its model_index.json), without diffusers; offline: from this disk alone. Raises as
    `load_backbone` does.
    """
    location = locate(name)
    try:
        file = Path(location, "model_index.json")
        if not Path(location).is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(location, file.name, local_files_only=offline))
        index = json.loads(read_text(file))
        if not isinstance(index, dict):
            raise ValueError(f"{file} is no object of JSON")
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no Hub id
        cause = str(error).splitlines()[0].rstrip(".")
        licence = "accept the licence on its page, if it asks, and run `hf auth login`"
        offline = f"run `hf download {location} --local-dir FOLDER` elsewhere, and set backbone.name=FOLDER"
        raise OSError(f"{location} is neither here nor within reach ({cause}): {licence}; or {offline}") from error
    if not isinstance(class_name := index.get("_class_name"), str):
        raise ValueError(f"{location} names no pipeline: _class_name in its model_index.json is {short(class_name)}")
    # It lists a part that was left out, such as the T5 of an SD3, as [null, null].
    parts = {part: value for part, value in index.items() if isinstance(value, list) and value != ABSENT}
    if strange := [part for part, value in parts.items() if value[:1] not in (["diffusers"], ["transformers"])]:
        raise ValueError(f"{location} has code of its own for its {cut(strange[0])}, which would have to run: refused")
    if missing := [part for part in parts if Path(location).is_dir() and not Path(location, part).is_dir()]:
        absent = f'for a part that the model does without (the T5 of an SD3), write "{missing[0]}": [null, null] there'
        raise OSError(f"{location} lacks the folder {missing[0]}, named in its index: download it, or, {absent}")
    return location, index


def locate(name: str) -> str:
    """The folder or the Hub id that `name` stands for."""
    if name == "shapes":
        return str(PIPELINE)
    location = KNOWN_MODELS.get(name, name)
    if not Path(location).is_dir() and "/" not in location:
        known = ("shapes", *KNOWN_MODELS)
        hint = f"{nearest(location, known)}known: {', '.join(known)}, a local folder, a Hub id owner/name"
        raise ValueError(f"unknown backbone {short(name)}; {hint}")
    if Path(location).is_dir() and not Path(location, "model_index.json").is_file():
        raise ValueError(f"{location} holds no model_index.json: pass the folder of a diffusers pipeline")
    return location
