"""From the file of a published checkpoint to a frozen network: reading it, renaming, reading off sizes, and checking
that each weight found its place.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowbp.given import cut, read_data
from flowbp.rewards.registry import find_file

State = dict[str, Tensor]
RENAMED: dict[str, dict[str, str]] = read_data(__file__, "renamed.yaml")
SIZES: dict[str, dict[str, Any]] = read_data(__file__, "sizes.yaml")


def read_state_dict(folder: str | Path, stem: str) -> State:
    """The tensors of `stem` in `folder`: safetensors, or a torch file read with weights_only (no code is run)."""
    path = find_file(folder, stem)
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, which could run code: convert it to .safetensors") from error


def load_frozen(cls, folder: str | Path, dtype: torch.dtype):
    """The transformers model of class `cls` in `folder`, in eval mode, its parameters frozen."""
    return cls.from_pretrained(folder, local_files_only=True, dtype=dtype).eval().requires_grad_(False)


def frozen_model(cls, config, state: State, dtype: torch.dtype, checkpoint: str, **options):
    """A transformers model of class `cls` with exactly the weights of `state`, in eval mode, its parameters frozen.

    Raises ValueError, naming `checkpoint`, when a weight is missing, left over or of another shape.
    """
    options |= {"config": config, "state_dict": state, "dtype": dtype}
    try:
        model, report = cls.from_pretrained(None, output_loading_info=True, **options)
    except RuntimeError as error:  # another shape
        raise ValueError(f"these are not the weights of {checkpoint}: {cut(error, 400)}") from error
    if report["missing_keys"] or report["unexpected_keys"]:
        missing, left_over = (list(map(cut, sorted(report[keys])[:3])) for keys in ("missing_keys", "unexpected_keys"))
        raise ValueError(f"these are not the weights of {checkpoint}: missing {missing}, left over {left_over}")
    return model.eval().requires_grad_(False)


def frozen_head(layers: Mapping[str, nn.Module], weights: State, dtype: torch.dtype) -> nn.Sequential:
    """The named layers in sequence, with exactly these weights, in eval mode, frozen. Runs in float32 at least."""
    head = nn.Sequential(OrderedDict(layers))
    head.load_state_dict(weights)
    return head.to(torch.promote_types(dtype, torch.float32)).eval().requires_grad_(False)


def renamed(state: State, naming: str) -> State:
    """`state` under the names that its class in transformers has, by the rules of `naming` in renamed.yaml."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in RENAMED[naming].items():
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def below(state: State, prefix: str, checkpoint: str) -> State:
    """The weights whose names begin with `prefix`, without the prefix. Raises ValueError, naming `checkpoint`, for
    none.
    """
    if not (found := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}):
        raise ValueError(f"these are not the weights of {checkpoint}: nothing is named {prefix}*")
    return found


def encoder_sizes(state: State, encoder: str, heads: int) -> dict[str, int]:
    """The settings of an encoder of sizes.yaml, from the shapes of its weights.

    heads: of the attention, which no shape tells. Raises KeyError for a weight that is missing.
    """
    places = dict(SIZES[encoder])
    layers, _, rest = places.pop("layer").partition("0")
    sizes = {key: state[name].shape[axis] for key, (name, axis) in places.items()}
    if "patches" in sizes:
        sizes["image_size"] = sizes["patch_size"] * round((sizes.pop("patches") - 1) ** 0.5)
    count = sum(key.startswith(layers) and key.endswith(rest) for key in state)
    return sizes | {"num_hidden_layers": count, "num_attention_heads": heads}
