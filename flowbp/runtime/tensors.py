"""Files of tensors that carry their digest, so that damage is seen when they are read: safetensors whose metadata say
what the tensors are of, and the SHA-256 of both.

All that is added to the metadata is one entry, of JSON, because safetensors writes several in random order: equal
tensors make equal files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowbp.runtime.files import replacing

ENTRY, SHA256 = "flowbp", "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], cache: bool = False) -> None:
    """Write tensors, whole or not at all. about: says what they are of. cache: as in `replacing`."""
    whole = {name: value.contiguous().cpu() for name, value in tensors.items()}
    with replacing(path, cache) as scratch:
        _save(whole, scratch, {}, about)


def seal_tensors(path: Path) -> None:
    """Put the digest into a file that another library wrote, beside its own metadata."""
    tensors, about = read_tensors(path, sealed=False)
    path.unlink()  # the tensors read from the old file, which writing in place would change
    _save(tensors, path, about, {})


def _save(tensors: dict[str, Tensor], path: Path, others: Mapping[str, str], about: Mapping[str, str]) -> None:
    entry = {**about, SHA256: digest(tensors, {**others, **about})}
    save_file(tensors, path, metadata={**others, ENTRY: json.dumps(entry, sort_keys=True)})


def read_tensors(
    path: Path, about: Mapping[str, str] | None = None, sealed: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of them. Raises OSError, which names the file, if it is damaged.

    about: what they must be of. sealed: False takes files without a digest too, such as those of other programs.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, found = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        sealed = sealed or ENTRY in found
        found |= json.loads(found.pop(ENTRY, "{}"))
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, or no file of tensors: {error}") from error
    if found.pop(SHA256, None) != digest(tensors, found) and sealed:
        raise OSError(f"{path} is damaged: it has changed since it was written")
    for key, value in (about or {}).items():
        if found.get(key) != value:
            raise OSError(f"{path} is of another {key}: it holds {str(found.get(key))[:80]!r}, not {value[:80]!r}")
    return tensors, found


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of `about`, and of names, dtypes, shapes and values."""
    found = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
