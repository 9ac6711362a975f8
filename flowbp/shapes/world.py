"""The world of `shapes`: its captions, when a scene of 32 x 32 pixels satisfies one, and the look of its shapes.

One to four flat shapes (4 shapes x 6 colours) stand on light grey, apart from one another and inside the frame. A scene
holds what its caption says and nothing else. The six kinds of caption are those of GenEval (Ghosh et al. 2023, arXiv
2310.11513):
    single object      a circle
    colours            a red circle
    counting           three circles, three red circles
    two objects        a circle and a square
    position           a circle left of a square, a red circle left of a blue square
    attribute binding  a red circle and a blue square
Lengths are in pixels, x to the right and y down; pixel i spans [i, i + 1].
"""

from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

from flowbp.given import short

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0, "yellow": 54, "green": 120, "cyan": 180, "blue": 235, "purple": 290}  # degrees
# direction from the second object to the first
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {"two": 2, "three": 3, "four": 4}
WINDOW = 15  # side of a stamp


class Spec(NamedTuple):
    """What a caption asks for: exactly these objects, each (colour or None, shape). With a `relation`, the first of two
    stands in it to the second.
    """

    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None


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
            raise ValueError(f"{short(words)} in caption {short(text)} is not '[colour] shape'; {known}")
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
