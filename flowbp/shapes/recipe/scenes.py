"""What pre-training of the `shapes` model draws: captions, true and false, and scenes and pictures of them.

All randomness comes from a numpy Generator.
"""

import colorsys
from functools import cache

import numpy as np

from ..world import HUES, RELATIONS, SHAPES, SIZE, WINDOW, Object, Spec, satisfies, stamp
from .captions import CATEGORIES, caption, pools

DIFFICULTY = {"single object": 1, "colours": 1, "counting": 2, "two objects": 2, "position": 3, "attribute binding": 2}


def sample_spec(rng: np.random.Generator, split: str = "train") -> Spec:
    """A caption for pre-training: categories in the proportions of `DIFFICULTY`, plain and coloured equally often."""
    weights = np.array(list(DIFFICULTY.values())) / sum(DIFFICULTY.values())
    lists = pools(split)[CATEGORIES[rng.choice(len(CATEGORIES), p=weights)]]
    pool = lists[rng.integers(len(lists))]
    return pool[rng.integers(len(pool))]


@cache
def texts(split: str) -> frozenset[str]:
    """Every caption of a split."""
    return frozenset(caption(spec) for lists in pools(split).values() for pool in lists for spec in pool)


def true_specs(objects: list[Object], margin: float = 0.0) -> list[Spec]:
    """Every caption of the six kinds that is true of a scene. margin: as for `satisfies`."""
    named, plain = [(o.colour, o.shape) for o in objects], [(None, o.shape) for o in objects]
    specs = [Spec(tuple(names)) for names in (named, plain) if len(names) == 1 or len(set(names)) == 1]
    if len(objects) == 2:
        pairs = [tuple(p) for names in (named, plain) if len(set(names)) == 2 for p in (names, names[::-1])]
        candidates = [Spec(p, relation) for p in pairs for relation in (None, *RELATIONS)]
        specs += [spec for spec in candidates if satisfies(objects, spec, margin)]
    return specs


def corrupt(spec: Spec, rng: np.random.Generator) -> Spec:
    """A hard negative: one wrong colour, shape, number or relation, or the colours (or places) of both objects
    swapped.
    """
    objects, n = list(spec.objects), len(spec.objects)
    coloured, counted = objects[0][0] is not None, len(set(objects)) == 1
    kinds = ["shape"] + ["colour"] * coloured + ["number"] * counted + ["relation"] * bool(spec.relation)
    kinds += ["swap"] * (not counted and (coloured or bool(spec.relation)))
    kind = kinds[rng.integers(len(kinds))]
    if kind == "number":
        return Spec((objects[0],) * int(rng.choice([k for k in (1, 2, 3, 4) if k != n])))
    if kind == "relation":
        return spec._replace(relation=str(rng.choice([r for r in RELATIONS if r != spec.relation])))
    if kind == "swap":
        if not coloured:
            return spec._replace(objects=tuple(objects[::-1]))
        (c1, s1), (c2, s2) = objects
        return spec._replace(objects=((c2, s1), (c1, s2)))
    which = range(n) if counted else [int(rng.integers(n))]  # a counted attribute belongs to all of them
    colour, shape = objects[which[0]]
    if kind == "colour":
        new = (str(rng.choice([c for c in HUES if c != colour])), shape)
    else:
        new = (colour, str(rng.choice([s for s in SHAPES if s not in {s for _, s in objects}])))
    for i in which:
        objects[i] = new
    return spec._replace(objects=tuple(objects))


def sample_negative(
    spec: Spec, rng: np.random.Generator, true: frozenset[str] = frozenset(), known: bool = True
) -> Spec:
    """A corrupted `spec` (see `corrupt`) whose text is not in `true`.

    `known` admits captions of the train split only. Pre-training needs that: otherwise it would see held-out captions,
    and always as false ones.
    """
    while True:
        wrong = corrupt(spec, rng)
        if caption(wrong) not in true and (not known or caption(wrong) in texts("train")):
            return wrong


def sample_scene(spec: Spec, rng: np.random.Generator) -> list[Object]:
    """Objects at random places that satisfy `spec` clearly: relations by a margin of 2 pixels. Colours that `spec`
    leaves open are drawn.
    """
    n = len(spec.objects)
    while True:
        r = rng.integers(16, 23, n) / 4 if n <= 2 else rng.integers(15, 19, n) / 4
        edge = 1.2 * r + 0.5
        x, y = rng.uniform(edge, SIZE - edge), rng.uniform(edge, SIZE - edge)
        if any(np.hypot(x[i] - x[j], y[i] - y[j]) <= 1.25 * (r[i] + r[j]) + 1 for i in range(n) for j in range(i)):
            continue
        objects = []
        for i, (colour, shape) in enumerate(spec.objects):
            colour = colour or str(rng.choice(list(HUES)))
            hue = (HUES[colour] + rng.uniform(-8, 8)) % 360 / 360
            rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 0.95), rng.uniform(0.75, 0.95))
            objects.append(Object(shape, colour, float(x[i]), float(y[i]), float(r[i]), rgb))
        if satisfies(objects, spec, margin=2.0):
            return objects


def render(objects: list[Object], rng: np.random.Generator) -> np.ndarray:
    """The scene on light grey of random brightness: uint8 [32, 32, 3]. Places are rounded to an eighth of a pixel."""
    pad = WINDOW // 2
    image = np.full((SIZE + 2 * pad, SIZE + 2 * pad, 3), rng.uniform(0.82, 0.95), np.float32)
    for o in objects:
        col, row = int(o.x), int(o.y)
        alpha = stamp(o.shape, o.radius, round((o.x - col) * 8) / 8 - 0.5, round((o.y - row) * 8) / 8 - 0.5)[..., None]
        patch = image[row : row + WINDOW, col : col + WINDOW]
        patch += alpha * (np.asarray(o.rgb, np.float32) - patch)
    return (image[pad:-pad, pad:-pad] * 255 + 0.5).astype(np.uint8)
