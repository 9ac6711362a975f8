"""Files of tensors that carry their digest, so that damage is seen when they are read: safetensors whose metadata say
what the tensors are of, and the SHA-256 of both. Equal tensors of the same thing make equal files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowbp.given import short
from flowbp.runtime.files import replacing

SHA256 = "flowbp_sha256"  # no key of another program


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], cache: bool = False) -> None:
    """Write tensors, whole or not at all. about: says what they are of. cache: as in `replacing`."""
    with replacing(path, cache) as scratch:
        _save({name: value.contiguous().cpu() for name, value in tensors.items()}, scratch, about)


def seal_tensors(path: Path) -> None:
    """Put the digest into a file that another library wrote, beside its own metadata."""
    tensors, about = read_tensors(path, sealed=False)
    path.unlink()  # the tensors read from the old file, which writing in place would change
    _save(tensors, path, about)


def _save(tensors: dict[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    save_file(tensors, path, metadata={**about, SHA256: digest(tensors, about)})
    with path.open("r+b") as file:  # safetensors leaves the order of the metadata to chance
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(content) == size
        file.seek(8)
        file.write(content)


def read_tensors(
    path: Path, about: Mapping[str, str] | None = None, sealed: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of them. Raises OSError, which names the file, if it is damaged.

    about: what they must be of. sealed: False takes files without a digest too, such as those of other programs.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, found = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise OSError(f"{path} is damaged, or no file of tensors: {error}") from error
    recorded = found.pop(SHA256, None)
    if (sealed or recorded is not None) and recorded != digest(tensors, found):
        raise OSError(f"{path} is damaged: it has changed since it was written")
    for key, value in (about or {}).items():
        if found.get(key) != value:
            raise OSError(f"{path} is of another {key}: it holds {short(found.get(key))}, not {short(value)}")
    return tensors, found


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of `about`, and of names, dtypes, shapes and values."""
    found = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
