"""The world of `shapes`: captions, scenes that satisfy them, and renderings of 32 x 32 pixels.

One to four flat shapes (4 shapes x 6 colours) stand on light grey, apart from one another and inside the frame. A scene
holds what its caption says and nothing else. The six kinds of caption are those of GenEval (Ghosh et al. 2023, arXiv
2310.11513):
    single object      a circle
    colours            a red circle
    counting           three circles, three red circles
    two objects        a circle and a square
    position           a circle left of a square, a red circle left of a blue square
    attribute binding  a red circle and a blue square
Lengths are in pixels, x to the right and y down; pixel i spans [i, i + 1]. All randomness comes from a numpy Generator.
"""

from __future__ import annotations

import colorsys
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0, "yellow": 54, "green": 120, "cyan": 180, "blue": 235, "purple": 290}  # degrees
# direction from the second object to the first
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = ("single object", "colours", "counting", "two objects", "position", "attribute binding")
PLURALS = ("circles", "squares", "triangles", "crosses")
WORDS = ("a", "and", "left", "right", "of", "above", "below", *NUMBERS, *HUES, *SHAPES, *PLURALS)
WINDOW = 15  # side of a stamp


class Spec(NamedTuple):
    """What a caption asks for: exactly these objects, each (colour or None, shape). With a `relation`, the first of two
    stands in it to the second.
    """

    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        names = [f"{colour} {shape}" if colour else shape for colour, shape in self.objects]
        if len(names) > 1 and len(set(names)) == 1:
            number = next(word for word, n in NUMBERS.items() if n == len(names))
            return f"{number} {names[0]}{'es' if names[0].endswith('s') else 's'}"
        return f" {self.relation or 'and'} ".join(f"a {name}" for name in names)

    @property
    def category(self) -> str:
        coloured = self.objects[0][0] is not None
        if len(self.objects) == 1:
            return "colours" if coloured else "single object"
        if len(set(self.objects)) == 1:
            return "counting"
        if self.relation:
            return "position"
        return "attribute binding" if coloured else "two objects"


class Object(NamedTuple):
    shape: str
    colour: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)  # as drawn, in [0, 1]; not set by the checker


def parse(text: str) -> Spec:
    """The `Spec` of a caption; raises ValueError for a text that is not a caption of this world."""

    def noun(words: str) -> tuple[str | None, str]:
        *colour, shape = words.split()
        if shape not in SHAPES or len(colour) > 1 or any(c not in HUES for c in colour):
            known = f"shapes {SHAPES}, colours {tuple(HUES)}"
            raise ValueError(f"{words!r} in caption {text!r} is not '[colour] shape'; {known}")
        return (colour[0] if colour else None), shape

    number, _, rest = text.partition(" ")
    if number in NUMBERS:
        singular = rest.removesuffix("es") if rest.endswith("crosses") else rest.removesuffix("s")
        return Spec((noun(singular),) * NUMBERS[number])
    for word in ("and", *RELATIONS):
        first, separator, second = text.partition(f" {word} a ")
        if separator:
            return Spec((noun(first.removeprefix("a ")), noun(second)), None if word == "and" else word)
    return Spec((noun(text.removeprefix("a ")),))


def satisfies(objects: list[Object], spec: Spec, margin: float = 0.0) -> bool:
    """Whether the objects are exactly those of `spec`.

    A relation must dominate the other axis by more than `margin` pixels.
    """
    if len(objects) != len(spec.objects):
        return False
    for order in permutations(objects):
        pairs = zip(order, spec.objects, strict=True)
        if all(o.shape == shape and colour in (None, o.colour) for o, (colour, shape) in pairs):
            if spec.relation is None:
                return True
            ux, uy = RELATIONS[spec.relation]
            dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
            if ux * dx + uy * dy - abs(uy * dx + ux * dy) > margin:
                return True
    return False


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


@cache
def stamp(shape: str, radius: float, dx: float, dy: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape centred at (7.5 + dx, 7.5 + dy) of a [15, 15] window, 5 x 5 samples a pixel."""
    grid = (np.arange(WINDOW * 5) + 0.5) / 5 - WINDOW / 2
    x, y = (grid[None, :] - dx) / radius, (grid[:, None] - dy) / radius
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.88
    elif shape == "triangle":
        inside = (y <= 0.7) & (abs(x) <= 1.15 * (y + 1.2) / 1.9)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1.05)
    return inside.reshape(WINDOW, 5, WINDOW, 5).mean((1, 3)).astype(np.float32)


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
