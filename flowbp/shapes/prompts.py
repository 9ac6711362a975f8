"""Captions of the `shapes` world, split into train, dev and test.

Ten pools cover the six categories. A pool of 40 captions or more is sorted by hash and cut 70 / 15 / 15, so its three
parts are disjoint: coloured counting (72), position (48 plain, 1440 coloured) and attribute binding (360). The small
pools (4 single objects, 24 colours, 12 two objects, 12 plain counts) are the same in all splits: there the images are
new, the captions are not.
"""

import hashlib
from functools import cache
from itertools import permutations
from typing import NamedTuple

from .world import CATEGORIES, HUES, NUMBERS, RELATIONS, SHAPES, Spec

SPLITS = ("train", "dev", "test")
SHARED_BELOW = 40
PER_CATEGORY = {"train": 240, "dev": 48, "test": 48}


class Prompt(NamedTuple):
    text: str
    category: str


@cache
def pools(split: str) -> dict[str, list[list[Spec]]]:
    """The captions of a split: category -> one list, or two (plain, coloured) for counting and position."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {SPLITS}")
    plain, coloured = [(None, s) for s in SHAPES], [(c, s) for c in HUES for s in SHAPES]
    plain_pairs = list(permutations(plain, 2))
    coloured_pairs = [(p, q) for p, q in permutations(coloured, 2) if p[0] != q[0] and p[1] != q[1]]
    whole = {
        "single object": [[Spec((o,)) for o in plain]],
        "colours": [[Spec((o,)) for o in coloured]],
        "counting": [[Spec((o,) * n) for n in NUMBERS.values() for o in kind] for kind in (plain, coloured)],
        "two objects": [[Spec(p) for p in plain_pairs]],
        "position": [[Spec(p, r) for p in pairs for r in RELATIONS] for pairs in (plain_pairs, coloured_pairs)],
        "attribute binding": [[Spec(p) for p in coloured_pairs]],
    }

    def part(pool: list[Spec]) -> list[Spec]:
        pool = sorted(pool, key=lambda spec: hashlib.sha256(spec.text.encode()).digest())
        if len(pool) < SHARED_BELOW:
            return pool
        held = round(0.15 * len(pool))
        return {"dev": pool[:held], "test": pool[held : 2 * held], "train": pool[2 * held :]}[split]

    return {category: [part(pool) for pool in whole[category]] for category in CATEGORIES}


def prompts(split: str) -> list[Prompt]:
    """The prompts of a split: 1440 of "train", 288 each of "dev" and "test". They are the same at every call.

    Categories come in turn, so the first 6 n prompts have n of each. Small pools repeat; plain and coloured captions
    alternate.
    """
    out = []
    for i in range(PER_CATEGORY[split] if split in SPLITS else 1):
        for category, lists in pools(split).items():
            pool = lists[i % len(lists)]
            out.append(Prompt(pool[i // len(lists) % len(pool)].text, category))
    return out
