"""The captions that the `shapes` model is trained and judged on, by category and split, and which of them are served.

Ten pools cover the six categories. A pool of 40 captions or more is sorted by hash and cut 70 / 15 / 15, so its three
parts are disjoint: coloured counting (72), position (48 plain, 1440 coloured) and attribute binding (360). The small
pools (4 single objects, 24 colours, 12 two objects, 12 plain counts) are the same in all splits: there the images are
new, the captions are not.
"""

import hashlib
from functools import cache
from itertools import permutations

from ..world import HUES, NUMBERS, RELATIONS, SHAPES, Spec

SPLITS = ("train", "dev", "test")
CATEGORIES = ("single object", "colours", "counting", "two objects", "position", "attribute binding")
SHARED_BELOW = 40
PER_CATEGORY = {"train": 240, "dev": 48, "test": 48}


def caption(spec: Spec) -> str:
    """The caption that asks for `spec`, of which `parse` is the inverse."""
    names = [f"{colour} {shape}" if colour else shape for colour, shape in spec.objects]
    if len(names) > 1 and len(set(names)) == 1:
        number = next(word for word, n in NUMBERS.items() if n == len(names))
        return f"{number} {names[0]}{'es' if names[0].endswith('s') else 's'}"
    return f" {spec.relation or 'and'} ".join(f"a {name}" for name in names)


def category_of(spec: Spec) -> str:
    """The one of CATEGORIES that a caption belongs to."""
    coloured = spec.objects[0][0] is not None
    if len(spec.objects) == 1:
        return "colours" if coloured else "single object"
    if len(set(spec.objects)) == 1:
        return "counting"
    if spec.relation:
        return "position"
    return "attribute binding" if coloured else "two objects"


@cache
def pools(split: str) -> dict[str, list[list[Spec]]]:
    """The captions of a split: category -> one list, or two (plain, coloured) for counting and position."""
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
        pool = sorted(pool, key=lambda spec: hashlib.sha256(caption(spec).encode()).digest())
        if len(pool) < SHARED_BELOW:
            return pool
        held = round(0.15 * len(pool))
        return {"dev": pool[:held], "test": pool[held : 2 * held], "train": pool[2 * held :]}[split]

    return {category: [part(pool) for pool in whole[category]] for category in CATEGORIES}


def served(split: str) -> dict[str, list[str]]:
    """What prompts.yaml holds of a split: category -> its captions in the order in which they are served.

    Plain and coloured captions alternate. A category of one pool, which is served from the first again when it ends, is
    listed once.
    """
    listed = {}
    for category, lists in pools(split).items():
        count = PER_CATEGORY[split] if len(lists) > 1 else min(PER_CATEGORY[split], len(lists[0]))
        turns = [(lists[i % len(lists)], i // len(lists)) for i in range(count)]
        listed[category] = [caption(pool[i % len(pool)]) for pool, i in turns]
    return listed
