"""The published rewards: where their checkpoints are, what their scores mean, and how to load them.

A reward is a class in a file of its own, imported when it is chosen. What is known about its checkpoint stands in
`published.yaml`; `flowbp rewards` prints it. The files are in a local folder, or else on the Hub at a pinned revision.
They are read without running code that is in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from flowbp import log, shapes
from flowbp.given import cut, digest_files, find, nearest, read_data, short
from flowbp.rewards.base import CallableReward, Reward

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
EMBEDDED = {"shapes": shapes.REWARD, "shapes-monitor": shapes.MONITOR}


@dataclass(frozen=True)
class HubFiles:
    """Files of one Hub repository, by names or glob patterns, each of which must find one. revision: a commit; None is
    the newest.
    """

    repository: str
    names: tuple[str, ...]
    revision: str | None = None

    def missing(self, folder: Path) -> list[str]:
        """The names for which `folder` holds no file. Another format of a checkpoint serves too: x.safetensors for
        x.pt.
        """
        return [name for name in self.names if not any(any(folder.glob(other)) for other in _formats(name))]

    def download_command(self, folder: str | Path) -> str:
        """The shell line that puts these files into `folder`."""
        revision = f" --revision {self.revision}" if self.revision else ""
        patterns = any("*" in name for name in self.names)
        wanted = " ".join(f'--include "{name}"' if patterns else name for name in self.names)
        return f"hf download {self.repository} {wanted}{revision} --local-dir {folder}"


@dataclass(frozen=True)
class RewardSource:
    """A published reward.

    target       "module:Class" of `flowbp.rewards`; the class is called with one folder for each key of `files`, with
                 `device` and with `dtype`
    files        constructor argument -> files on the Hub. "model" comes first; its first name is the checkpoint
    parameters   of the model
    scores       where scores usually lie
    hinge        a published target, None where there is none
    sha256       of the checkpoint. None where no digest could be confirmed: unless the Hub's revision is given, the
                 files are then not pinned, and the loader says so
    instruction  where the text is published that a language model was trained to be asked (see `qwen.instruction`)
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


REWARDS = TypeAdapter(dict[str, RewardSource]).validate_python(read_data(__file__, "published.yaml"))


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
    dtype: of the weights, "float32" or "bfloat16"; None is the reward's own. "tf32" is float32, of which the reward's
        matrix products, forward and backward, take TF32 (`flowbp_kernels.in_tf32`).
    revision: commit of a Hub checkpoint.  sha256: digest of the checkpoint file, checked before the file is read.
    Raises ValueError for an unknown name or a wrong digest, and FileNotFoundError, with the commands that fetch the
    files, where they are missing.
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
        line = pin(folders["model"], checkpoint)
        log.warning(f"reward {name}: nothing pins {checkpoint}; to read the same again, put into its config  {line}")
    options = {} if dtype is None else {"dtype": weight_dtype(dtype)}
    reward = find("reward", f"flowbp.rewards.{source.target}")(**folders, device=device, **options)
    return find("reward", "flowbp.rewards.tf32:InTF32")(reward) if dtype == "tf32" else reward


def weight_dtype(dtype: str) -> str:
    """torch's name of the dtype in which a reward of `dtype` holds its weights."""
    return "float32" if dtype == "tf32" else dtype


def check_options(name: str, model: str | None, dtype: str | None, revision: str | None, sha256: str | None) -> None:
    """Raise ValueError for an unknown reward, and for options that it does not take. No file is read."""
    if ":" in name:
        if any(value is not None for value in (model, dtype, revision, sha256)):
            raise ValueError(f"{cut(name)} is code of your own: model, dtype, revision and sha256 are not for it")
    elif "*" in find_source(name).files["model"].names[0] and sha256 is not None:
        raise ValueError(f"the reward {name!r} comes in several files, which no sha256 covers: pin it with revision=")


def find_source(name: str) -> RewardSource:
    """The entry of `REWARDS`. Raises ValueError for an unknown name, and suggests the nearest."""
    if name not in REWARDS:
        known = f"{nearest(name, REWARDS)}known: {', '.join(REWARDS)}, or a callable of your own as module:function"
        raise ValueError(f"unknown reward {short(name)}; {known}")
    return REWARDS[name]


def find_folders(name: str, source: RewardSource, model: str | None, revision: str | None) -> dict[str, Path]:
    """A folder for each of the reward's files: `model` if that is a folder or embedded, else one of the Hub cache."""
    if model in EMBEDDED:
        return dict.fromkeys(source.files, EMBEDDED[model])
    files = dict(source.files)
    if model is not None and Path(model).is_dir():
        if missing := [file for part in files.values() for file in part.missing(Path(model))]:
            lacking = f"{model} lacks {', '.join(missing)} of the reward {name!r}"
            raise FileNotFoundError(f"{lacking}. {how_to_fetch(name, files, model)}")
        return dict.fromkeys(files, Path(model))
    if model is not None or revision is not None:
        files["model"] = replace(files["model"], repository=model or files["model"].repository, revision=revision)
    try:
        return {argument: locate(part) for argument, part in files.items()}
    except (OSError, ValueError) as error:  # ValueError: a name that is no Hub id
        reason = (str(error) or type(error).__name__).splitlines()[0]
        absent = f"the reward {name!r} is no folder here, not in the Hub's cache, and not given by the Hub ({reason})"
        raise FileNotFoundError(f"{absent}. {how_to_fetch(name, files, f'rewards/{name}')}") from error


def how_to_fetch(name: str, files: Mapping[str, HubFiles], folder: str | Path) -> str:
    """The commands that fetch the reward into a local folder, and the config key that names the folder."""
    commands = "\n".join(f"  {part.download_command(folder)}" for part in files.values())
    if (published := REWARDS[name].instruction) is not None:
        question = f"{{prompt}} for the caption (in the code at {published})"
        commands += f"\nwrite what it was trained to be asked to {folder}/instruction.txt, {question}"
    config = f"reward: {{name: {name}, model: {folder}}}"
    return f"Fetch it where there is a network:\n{commands}\nand name the folder in the config:\n  {config}"


# -- files -------------------------------------------------------------------------------------------------------------


def locate(files: HubFiles) -> Path:
    """The folder of the Hub cache that holds `files`, downloaded if need be. Raises OSError when they are neither in
    the cache nor within reach.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(files.repository, revision=files.revision, allow_patterns=list(files.names)))
    if missing := files.missing(folder):
        raise FileNotFoundError(f"{files.repository} holds no {', '.join(missing)}")
    return folder


def find_file(folder: str | Path, stem: str) -> Path:
    """The file `stem` of `folder`, as .safetensors, .pt, .pth or .bin."""
    for suffix in SUFFIXES:
        if (path := Path(folder, stem + suffix)).is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no single file {stem} as {', '.join(SUFFIXES)}")


def pin(folder: Path, name: str) -> str:
    """What a config must say to get these files and no others: the commit for a folder of the Hub's cache, or else the
    digest of the one file.
    """
    if folder.parent.name == "snapshots":
        return f"revision: {folder.name}"
    if "*" in name:
        return f"a revision of the Hub, in place of {folder}"
    return f"sha256: {digest_files([find_file(folder, Path(name).stem)])}"


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the file has this digest."""
    if (found := digest_files([path])) != expected.lower():
        raise ValueError(f"{path} has the sha256 {found}, not {expected}: fetch it again, or pass the digest you trust")


def _formats(name: str) -> list[str]:
    path = Path(name)
    return [str(path.with_suffix(suffix)) for suffix in SUFFIXES] if path.suffix in SUFFIXES else [name]
