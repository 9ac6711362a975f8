"""Text embeddings, computed once: one safetensors file a prompt, in a folder that all runs share.

    <cache>/embeddings/<what embeds>/<prompt>.safetensors

Both names are hashes. The first covers all that determines an embedding beside the prompt: the backbone class and its
text options, the text encoders' configs and weights, the tokenizers' files, and the versions of the libraries that run
them. Every file carries the SHA-256 of its tensors; one that does not match it is computed again. The cache is
$FLOWBP_CACHE, else $XDG_CACHE_HOME/flowbp or ~/.cache/flowbp.
"""

import functools
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flowbp import log
from flowbp.backbones.base import Backbone
from flowbp.given import digest_text, short
from flowbp.guidance import Conditioning
from flowbp.runtime.console import Progress, progress_bar
from flowbp.runtime.distributed import process_state
from flowbp.runtime.environment import versions
from flowbp.runtime.files import remove_left
from flowbp.runtime.tensors import read_tensors, write_tensors
from flowbp_kernels import offload_blocks

BATCH = 8  # prompts that are encoded together, always equally many, because rounding depends on the size of a batch

Encode = Callable[[list[str]], Conditioning]
Device = torch.device | str | None


def embed_once(
    backbone: Backbone, prompts: Iterable[str], cache: Path | None = None, device: Device = None, offload: bool = False
) -> None:
    """Embed `prompts` and the empty prompt into `cache`, release the text encoders, and let `backbone.encode` read it.

    Prompts that the cache has are not embedded again. The processes of a distributed run share the work.

    device: where the encoders embed, if there is anything to embed, and where `encode` puts what it reads; None means
    where the network is. A network that is moved there afterwards leaves the device to the text encoders, which may be
    as large.
    offload: whether the weights of the encoders' blocks stay in CPU memory, from which each block visits the device.

    Raises OSError if the disk is too small.
    """
    device = torch.device(device or backbone.denoiser.device)
    embeddings = EmbeddingCache((cache or default_cache()) / "embeddings" / encoder_hash(backbone), device)
    state, encode = process_state(), backbone.encode

    @functools.cache
    def move() -> None:
        for encoder in text_encoders(backbone).values():
            offload_blocks(encoder, device) if offload else encoder.to(device)

    def on_device(prompts: list[str]) -> Conditioning:
        move()
        return encode(prompts)

    texts = list(dict.fromkeys(["", *prompts]))
    embeddings.fill(on_device, [""])
    share = texts[state.process_index :: state.num_processes]
    with progress_bar("embed", "prompt", len(share)) as bar:
        embeddings.fill(on_device, share, bar.update)
    state.wait_for_everyone()
    for name in text_encoders(backbone):
        setattr(backbone.pipe, name, None)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    backbone.encode = embeddings


def default_cache() -> Path:
    """$FLOWBP_CACHE, else flowbp in the user's cache folder."""
    named = os.environ.get("FLOWBP_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowbp"


class EmbeddingCache:
    """In the place of `backbone.encode`: called with prompts, it reads their conditioning from files of `folder`."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Named tensors [B, ...]. Raises ValueError for a prompt that was never embedded."""
        try:
            rows = [load_file(self.path(prompt)) for prompt in prompts]
        except (FileNotFoundError, SafetensorError) as error:
            cause = f"a prompt of {short(prompts)} is not, or no longer, in {self.folder} ({error})"
            way_out = "start again with --resume, or keep the encoders with data.embeddings=live"
            raise ValueError(f"the text encoders were released and {cause}: {way_out}") from error
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def path(self, prompt: str) -> Path:
        return self.folder / f"{digest_text(prompt)}.safetensors"

    def fill(self, encode: Encode, prompts: list[str], progress: Progress = lambda done: None) -> None:
        """Embed those of `prompts` that have no undamaged file."""
        missing = [prompt for prompt in prompts if not self.holds(prompt)]
        progress(len(prompts) - len(missing))
        if damaged := sum(self.path(prompt).exists() for prompt in missing):
            again = "cached embeddings in %s are damaged: computing them again"
            log.warning(f"%d of %d {again}", damaged, len(prompts), self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left(self.folder)
        self._check_space(len(missing))
        for first in range(0, len(missing), BATCH):
            chunk = missing[first : first + BATCH]
            embedded = encode(chunk + chunk[-1:] * (BATCH - len(chunk)))
            for row, prompt in enumerate(chunk):  # of several processes that write the same prompt, one wins
                tensors = {name: value[row] for name, value in embedded.items()}
                write_tensors(self.path(prompt), tensors, {"prompt": prompt}, cache=True)
            del embedded, tensors  # before the next chunk, which takes as much
            progress(len(chunk))

    def holds(self, prompt: str) -> bool:
        """Whether the prompt has an undamaged file."""
        try:
            read_tensors(self.path(prompt), {"prompt": prompt})
        except OSError:
            return False
        return True

    def _check_space(self, count: int) -> None:
        one, free = self.path(""), shutil.disk_usage(self.folder).free
        needed = count * one.stat().st_size if one.exists() else 0
        if needed > free:
            sizes = f"{count} embeddings need {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB"
            disk = "name a larger disk with data.cache=FOLDER or FLOWBP_CACHE"
            raise OSError(f"{sizes}: {disk}, or keep the text encoders in memory with data.embeddings=live")


def text_encoders(backbone: Backbone) -> dict[str, Any]:
    """The text encoders that the pipeline has, by name."""
    parts = sorted(backbone.pipe.components.items())
    return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}


def encoder_hash(backbone: Backbone) -> str:
    """Hash of all that determines an embedding beside the prompt. 64 evenly spaced values stand for a weight tensor."""
    digest = hashlib.sha256()
    weights = [p for encoder in text_encoders(backbone).values() for p in encoder.parameters()]
    quantisers = sorted({type(p).__module__.partition(".")[0] for p in weights} - {"torch"})
    libraries = list(versions("flowbp", "diffusers", "transformers", *quantisers).values())
    digest.update(repr((type(backbone).__qualname__, backbone.text_options, BATCH, libraries)).encode())
    for name, encoder in text_encoders(backbone).items():
        digest.update(json.dumps([name, encoder.config.to_dict()], sort_keys=True, default=str).encode())
        for key, value in encoder.state_dict().items():
            value = value.dequantize() if type(value).__module__.startswith("torchao") else value
            sample = value.flatten()[:: max(1, value.numel() // 64)].double().cpu().numpy()
            digest.update(repr((key, value.dtype, tuple(value.shape))).encode() + sample.tobytes())
    for name, part in sorted(backbone.pipe.components.items()):
        if name.startswith("tokenizer") and part is not None:
            for file, content in _tokenizer_files(part).items():
                digest.update(file.encode() + content)
    return digest.hexdigest()[:32]


def _tokenizer_files(tokenizer) -> dict[str, bytes]:
    """The files that `save_pretrained` writes, by name, without the padding and truncation of the last call."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers raises no other
            raise OSError(f"{folder} cannot be written: {error}. The disk of temporary files may be full") from error
        contents = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}
    if "tokenizer.json" in contents:
        kept = json.loads(contents["tokenizer.json"]) | {"padding": None, "truncation": None}
        contents["tokenizer.json"] = json.dumps(kept, sort_keys=True).encode()
    return contents
