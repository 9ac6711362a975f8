"""What a command is given, checked before anything is imported or loaded that takes seconds: prompts, the backbone's
folder, files of rewards, code of one's own, files to write. A mistake is then told at once.
"""

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

from flowbp.backbones import check_quantiser, check_switches, read_index
from flowbp.config import ConfigError, RunConfig
from flowbp.config.schema import EvaluationConfig, GenEvalConfig, ScorerConfig
from flowbp.given import find, short
from flowbp.rewards.base import find_callable, try_out
from flowbp.rewards.registry import find_folders, find_source
from flowbp.runtime.data import load_prompts

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def check_inputs(config: RunConfig, train: bool = False) -> None:
    """Raise ValueError or OSError for what is not there, or is not of its kind. train: check what training needs too.

    What can be told without torch is told first.
    """
    evaluation = config.evaluation
    prompts = [config.data.prompts] if train else []
    if evaluation is None and not train:
        raise ConfigError("this config has no evaluation: add evaluation.prompts=... to say what to score")
    if evaluation is not None:
        prompts += [source for source in (evaluation.prompts, evaluation.validation_prompts) if source is not None]
        check_checker(evaluation)
    for source in prompts:
        load_prompts(source)
    for spec in reward_specs(config):
        if ":" in spec.name:
            find_callable(spec.name)
        else:
            find_folders(spec.name, find_source(spec.name), spec.model, spec.revision)
    if train and config.optimizer.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError("optimizer.name=adamw8bit: no bitsandbytes here; pip install bitsandbytes, or use adamw")
    check_quantiser(config.backbone.model_dump()["quantise"])
    _, index = read_index(config.backbone.name)
    check_switches(index["_class_name"], config.backbone.attention, config.backbone.cuda_graph)


def reward_specs(config: RunConfig) -> list[ScorerConfig]:
    """The rewards of a run, then the monitors of its evaluation."""
    return [*config.reward.values(), *(config.evaluation.monitors.values() if config.evaluation is not None else ())]


def try_rewards(config: RunConfig, train: bool = False) -> None:
    """Let every reward that is a function score two random images once, with gradient where it is trained on. Raises
    ValueError.
    """
    from flowbp.runtime.distributed import process_state

    device, size = str(process_state().device), (config.rollout.height, config.rollout.width)
    for number, spec in enumerate(reward_specs(config)):
        if ":" in spec.name:
            try_out(spec.name, device, *size, gradient=train and number < len(config.reward))


def check_checker(evaluation: EvaluationConfig) -> None:
    checker = evaluation.checker
    if isinstance(checker, str) and ":" in checker:
        find("checker", checker)
    for key in ("detector", "colours") if isinstance(checker, GenEvalConfig) else ():
        if not Path(name := getattr(checker, key)).is_dir() and "/" not in name:
            raise FileNotFoundError(f"checker.{key}: {name} is neither a folder nor a Hub id owner/name")


def check_target(option: str, path: Path, *suffixes: str) -> None:
    """Raise ValueError or OSError where `path`, which `option` names, cannot be a file with one of `suffixes`."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path} lies in a folder that does not exist: make {path.parent} first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{option} {path} lies in a folder that cannot be written to")


def named_path(spec: str) -> tuple[str, Path]:
    """(name, path) of "NAME=PATH", or ("", path) of a path, which may have a = of its own, as out/lr=1e-4 has."""
    name, equals, path = spec.partition("=")
    return ("", Path(spec)) if not equals or Path(spec).exists() else (name, Path(path))


def parse_strengths(text: str) -> list[float]:
    """The different numbers of "0.25,0.5,1". Raises ValueError for another text."""
    try:
        strengths = list(dict.fromkeys(map(float, text.split(","))))
        if not all(0 < strength < math.inf for strength in strengths):
            raise ValueError
    except ValueError:
        rule = "name finite numbers above 0, such as 0.25,0.5,1 (0 is the base model, which is scored anyway)"
        raise ValueError(f"--strength {short(text)}: {rule}") from None
    return strengths


def parse_size(text: str) -> float:
    """Bytes of "24GB" (1e9), "24GiB" (2^30) or "80e9"."""
    number, unit = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", "(?:[KMGT]I?)?"
    match = re.fullmatch(rf"\s*({number})\s*({unit})B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 0 < size < math.inf or (match and not match[2] and size < 1e9):  # a bare 24 would be 24 bytes
        raise ValueError(f"{short(text)} is no size of a GPU in bytes: write 24GB, 24GiB or 80e9")
    return size
