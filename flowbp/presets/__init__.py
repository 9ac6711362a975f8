"""Presets: a YAML file here is a whole config; `published.yaml` holds the published runs, composed as backbone/method.

`flowbp presets` lists them, `flowbp presets NAME` prints one as a config.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["layers", "names"]

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published.yaml"


def names() -> list[str]:
    """Every preset, the whole configs first."""
    whole = sorted(path.stem for path in FOLDER.glob("*.yaml") if path != PUBLISHED)
    runs = published()
    pairs = ((backbone, method) for backbone in runs["backbones"] for method in runs["methods"])
    return whole + [f"{backbone}/{method}" for backbone, method in pairs if backbone in runs["methods"][method]]


def layers(name: str) -> list[dict[str, Any]]:
    """The mappings that make up the preset `name`, each to be laid over those before it."""
    if (FOLDER / f"{name}.yaml").is_file():
        return [yaml.safe_load((FOLDER / f"{name}.yaml").read_text())]
    backbone, _, method = name.partition("/")
    runs = published()
    named = {"output": f"runs/{name}", "method": {"name": method}}
    return [runs["common"], runs["backbones"][backbone], named, runs["methods"][method][backbone]]


@cache
def published() -> dict[str, Any]:
    return yaml.safe_load(PUBLISHED.read_text())
