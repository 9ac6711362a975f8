"""Presets: a YAML file here is a whole config; `published.yaml` holds the published runs, composed as backbone/method,
and `cards.yaml` LoRA runs that fit a small card, named backbone/memory. NAME-fast is the preset NAME with what
`fast.yaml` lays over it.

`flowbp presets` lists them, `flowbp presets NAME` prints one as a config.
"""

from pathlib import Path
from typing import Any

from flowbp.given import read_data

FOLDER = Path(__file__).parent
PUBLISHED, CARDS, FAST = "published", "cards", "fast"


def names() -> list[str]:
    """Every preset but the fast ones, the whole configs first."""
    whole = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in (PUBLISHED, CARDS, FAST))
    runs = read(PUBLISHED)
    pairs = ((backbone, method) for backbone in runs["backbones"] for method in runs["methods"])
    published = [f"{backbone}/{method}" for backbone, method in pairs if backbone in runs["methods"][method]]
    return [*whole, *published, *cards()]


def cards() -> list[str]:
    """The presets for small cards. Each ends with the memory that it is for: flux.1-dev/24gb."""
    return list(read(CARDS)["cards"])


def layers(name: str) -> list[dict[str, Any]]:
    """The mappings that make up the preset `name`, each to be laid over those before it; none for an unknown name."""
    if (base := name.removesuffix("-fast")) not in names():
        return []
    backbone, _, method = base.partition("/")
    if base in cards():
        own = read(CARDS)["cards"][base]
        found = [*layers(own["base"]), read(CARDS)["common"], {key: own[key] for key in own if key != "base"}]
    elif method:
        runs, named = read(PUBLISHED), {"method": {"name": method}}
        found = [runs["common"], runs["backbones"][backbone], named, runs["methods"][method][backbone]]
    else:
        found = [read(base)]
    if name != base:
        fast = read(FAST)
        published = fast["published"] if method and base not in cards() else {}
        found += [fast["every"], published, fast.get(method or base, {})]
    return [*found, {"output": f"runs/{name}"}]


def read(name: str) -> dict[str, Any]:
    return read_data(__file__, f"{name}.yaml")
