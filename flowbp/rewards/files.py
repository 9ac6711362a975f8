"""Where a reward's files are: in a local folder, or else on the Hub at a pinned revision. They are read without running
code that is in them.
"""

from dataclasses import dataclass
from pathlib import Path

from flowbp.foreign import digest_files

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


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
