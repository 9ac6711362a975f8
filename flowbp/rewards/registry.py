"""The published rewards: where each is, what its score means, and how to load it.

A reward is a class in a file of its own, imported when chosen; what is known about its checkpoint stands here. `flowbp
rewards` prints it.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flowbp.rewards.base import Reward
from flowbp.rewards.callable import CallableReward
from flowbp.rewards.files import HubFiles, check_sha256, find_file, locate, pin

__all__ = ["REWARDS", "RewardSource", "load_reward"]

log = logging.getLogger(__name__)

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CLIP_FOLDER = ("model.safetensors", "config.json", "preprocessor_config.json", *TOKENIZER)


EMBEDDED = {"shapes": "REWARD", "shapes-monitor": "MONITOR"}


@dataclass(frozen=True)
class RewardSource:
    """A published reward.

    target: "module:Class" of `flowbp.rewards`; the class is called with one folder for each key of `files`, `device`
        and `dtype`.
    files: constructor argument -> files on the Hub; "model" comes first, and its first name is the checkpoint that
        sha256 is of.
    parameters: of the model. scores: where scores usually lie. hinge: a published target, None where there is none.
    revision and sha256 are None where no value could be confirmed: then the files are not pinned, and the loader says
        so.
    instruction: where the text is published that a language model was trained to be asked (see `qwen.instruction`).
    """

    target: str
    files: Mapping[str, HubFiles]
    parameters: int
    licence: str
    scores: str
    paper: str
    hinge: float | None = None
    sha256: str | None = None
    instruction: str | None = None


REWARDS: dict[str, RewardSource] = {
    "clip": RewardSource(
        target="clip:CLIPReward",
        files={"model": HubFiles("openai/clip-vit-large-patch14", CLIP_FOLDER)},
        parameters=427_616_513,
        licence="MIT",
        scores="-1 to 1, mostly .15 to .35",
        paper="arXiv 2104.08718",
    ),
    "pickscore": RewardSource(
        target="clip:PickScore",
        files={"model": HubFiles("yuvalkirstain/PickScore_v1", CLIP_FOLDER)},
        parameters=986_109_441,
        licence="see its card",
        scores="mostly 17 to 25",
        hinge=40.0,
        paper="arXiv 2305.01569",
    ),
    "hpsv2": RewardSource(
        target="hpsv2:HPSv2",
        files={"model": HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)), "tokenizer": HubFiles(LAION_H, TOKENIZER)},
        parameters=986_109_441,
        licence="Apache-2.0",
        scores="-1 to 1, mostly .2 to .4",
        hinge=0.55,
        paper="arXiv 2306.09341",
    ),
    "aesthetic": RewardSource(
        target="aesthetic:AestheticReward",
        files={
            "model": HubFiles("camenduru/improved-aesthetic-predictor", ("sac+logos+ava1-l14-linearMSE.pth",)),
            "clip": HubFiles("openai/clip-vit-large-patch14", ("model.safetensors", "config.json")),
        },
        parameters=428_544_482,
        licence="Apache-2.0",
        scores="1 to 10, mostly 4 to 7",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        paper="LAION-Aesthetics v2",
    ),
    "imagereward": RewardSource(
        target="imagereward:ImageReward",
        files={
            "model": HubFiles("THUDM/ImageReward", ("ImageReward.pt",)),
            "tokenizer": HubFiles("google-bert/bert-base-uncased", TOKENIZER),
        },
        parameters=446_206_689,
        licence="Apache-2.0",
        scores="mostly -2 to 2",
        paper="arXiv 2304.05977",
    ),
    "hpsv3": RewardSource(
        target="hpsv3:HPSv3",
        files={
            "model": HubFiles("MizzenAI/HPSv3", ("HPSv3.safetensors",)),
            "base": HubFiles("Qwen/Qwen2-VL-7B-Instruct", ("config.json", *TOKENIZER)),
        },
        parameters=8_292_152_882,
        licence="MIT",
        scores="mostly 0 to 15",
        hinge=13.5,
        paper="arXiv 2508.03789",
        instruction="github.com/MizzenAI/HPSv3",
    ),
    "unifiedreward": RewardSource(
        target="unifiedreward:UnifiedReward",
        files={"model": HubFiles("CodeGoat24/UnifiedReward-2.0-qwen-7b", ("model*.safetensors", "*.json"))},
        parameters=8_292_166_656,
        licence="MIT",
        scores="1 to 5",
        paper="arXiv 2503.05236",
        instruction="github.com/CodeGoat24/UnifiedReward",
    ),
}


def load_reward(
    name: str,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
) -> Reward:
    """The reward `name` of `REWARDS`, frozen, or your own callable "module:function".

    model: a local folder that holds all its files; a Hub id; "shapes" or "shapes-monitor" (embedded); None is the
        published checkpoint.
    dtype: of the weights, "float32" or "bfloat16"; None is the reward's own. revision: commit of a Hub checkpoint.
        sha256: digest of the
    checkpoint file, checked before it is read. Raises ValueError for an unknown name or a wrong digest,
        FileNotFoundError with the commands
    that fetch the files.
    """
    check_options(name, model, dtype, revision, sha256)
    if ":" in name:
        return CallableReward(name, device)
    source = find_source(name)
    folders = find_folders(name, source, model, revision)
    checkpoint = source.files["model"].names[0]
    if sha256 is not None:
        check_sha256(find_file(folders["model"], Path(checkpoint).stem), sha256)
    elif source.sha256 is not None and Path(folders["model"], checkpoint).is_file():
        check_sha256(Path(folders["model"], checkpoint), source.sha256)
    elif model not in EMBEDDED and revision is None and source.files["model"].revision is None:
        found = pin(folders["model"], checkpoint)
        log.warning(
            "reward %s: nothing pins %s; to read the same again, put into its config  %s", name, checkpoint, found
        )
    options = {} if dtype is None else {"dtype": dtype}
    module, _, attribute = source.target.partition(":")
    return getattr(importlib.import_module(f"flowbp.rewards.{module}"), attribute)(**folders, device=device, **options)


def check_options(name: str, model: str | None, dtype: str | None, revision: str | None, sha256: str | None) -> None:
    """Raises ValueError for an unknown reward, and for options that it does not take; reads nothing."""
    if ":" in name:
        if any(value is not None for value in (model, dtype, revision, sha256)):
            raise ValueError(f"{name} is code of your own: model, dtype, revision and sha256 are not for it")
    elif sha256 is not None and "*" in find_source(name).files["model"].names[0]:
        raise ValueError(
            f"the reward {name!r} comes in several files, which one sha256 cannot cover: pin it with revision="
        )
    else:
        find_source(name)


def find_source(name: str) -> RewardSource:
    """The entry of `REWARDS`. Raises ValueError that names the nearest one."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reward {name!r}; {hint}known: {', '.join(REWARDS)}, or a callable of your own as module:function"
        )
    return REWARDS[name]


def find_folders(name: str, source: RewardSource, model: str | None, revision: str | None) -> dict[str, Path]:
    """The folder of each of the reward's files: `model` where it is a folder or embedded, else of the Hub cache."""
    if model in EMBEDDED:
        from flowbp import shapes

        return dict.fromkeys(source.files, getattr(shapes, EMBEDDED[model]))
    files = dict(source.files)
    if model is not None and Path(model).is_dir():
        if missing := [file for part in files.values() for file in part.missing(Path(model))]:
            raise FileNotFoundError(
                f"{model} lacks {', '.join(missing)} of the reward {name!r}. {how_to_fetch(name, files, model)}"
            )
        return dict.fromkeys(files, Path(model))
    if model is not None:
        files["model"] = replace(files["model"], repository=model, revision=None)
    if revision is not None:
        files["model"] = replace(files["model"], revision=revision)
    try:
        return {argument: locate(part) for argument, part in files.items()}
    except (OSError, ValueError) as error:  # ValueError: a name that is no Hub id
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"the reward {name!r} is neither a local folder nor in the Hub's cache, and the Hub did not give it "
            f"({reason}). " + how_to_fetch(name, files, f"rewards/{name}")
        ) from error


def how_to_fetch(name: str, files: Mapping[str, HubFiles], folder: str | Path) -> str:
    """What to type to have the reward in a local folder, and the config key that names it."""
    commands = "\n".join(f"  {part.download_command(folder)}" for part in files.values())
    if (published := REWARDS[name].instruction) is not None:
        question = f"{{prompt}} for the caption (in the code at {published})"
        commands += f"\nwrite what it was trained to be asked to {folder}/instruction.txt, {question}"
    config = f"reward: {{name: {name}, model: {folder}}}"
    return f"Fetch it where there is a network:\n{commands}\nand name the folder in the config:\n  {config}"
