"""Does an image show what its caption says? The programmatic judge of `shapes`, about 1 ms an image.

Pixels with colour are grouped into blobs. Each blob must have one hue and the outline of one of the four shapes, by the
overlap with templates at half-pixel offsets. The shapes must be exactly those of the caption, in the relation that it
states. This checker plays the part of GenEval's detector, the held-out metric: no training stage and no reward may call
it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product

import numpy as np

from .world import HUES, SHAPES, SIZE, WINDOW, Object, parse, satisfies, stamp

COLOURED = 0.22  # least max(rgb) - min(rgb) of a pixel that belongs to an object
SPECK = 5  # blobs of fewer pixels are overlooked
PURITY = 0.85  # least share of a blob's colour that must lie within 30 degrees of one hue
OVERLAP = 0.78  # least soft IoU with the best template


@cache
def _templates() -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Stamps whose centre of mass lies at 7.25 or 7.75 on either axis, [N, 225], and the (shape, radius) of each."""
    bank, names = [], []
    middle = np.arange(WINDOW) + 0.5
    for shape in SHAPES:
        for radius in np.arange(3.25, 6.26, 0.25):
            mass = stamp(shape, radius, 0.0, 0.0)
            # A triangle's centre of mass lies below its centre.
            fall = WINDOW / 2 - float((mass.sum(1) * middle).sum() / mass.sum())
            for dy, dx in product((-0.25, 0.25), repeat=2):
                bank.append(stamp(shape, radius, dx, dy + fall).ravel())
                names.append((shape, float(radius)))
    return np.stack(bank), names


def _to_array(image) -> np.ndarray:
    """uint8 [32, 32, 3] or float [3, 32, 32] in [0, 1] (array or tensor) -> float32 [32, 32, 3] in [0, 1]."""
    if hasattr(image, "detach"):
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.cpu().numpy()
    image = np.asarray(image)
    if image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3):
        return image.astype(np.float32) / 255
    if image.dtype.kind == "f" and image.shape == (3, SIZE, SIZE):
        return image.transpose(1, 2, 0).astype(np.float32).clip(0, 1)
    forms = f"uint8 [{SIZE}, {SIZE}, 3] or float [3, {SIZE}, {SIZE}] in [0, 1]"
    raise ValueError(f"image is {image.dtype} {image.shape}; pass {forms}, resize other sizes first")


def find_objects(image) -> list[Object] | None:
    """The objects of an image, or None if any blob is no clean shape of one colour. image: as for `check`."""
    from matplotlib.colors import rgb_to_hsv  # here, to keep `import flowbp.shapes` light
    from scipy import ndimage

    rgb = _to_array(image)
    chroma, hue = np.ptp(rgb, -1), 360 * rgb_to_hsv(rgb)[..., 0]
    labels, n = ndimage.label(chroma > COLOURED)
    bank, names = _templates()
    pad, objects = WINDOW // 2 + 1, []
    for label in range(1, n + 1):
        blob = labels == label
        if blob.sum() < SPECK:
            continue
        soft = np.where(ndimage.binary_dilation(blob), chroma, 0)
        distance = abs((hue[blob][:, None] - np.array(list(HUES.values())) + 180) % 360 - 180)
        share = (chroma[blob][:, None] * (distance <= 30)).sum(0) / chroma[blob].sum()
        rows, cols = soft.sum(1), soft.sum(0)
        y, x = ((m * (np.arange(SIZE) + 0.5)).sum() / m.sum() for m in (rows, cols))
        top_row, left = int(np.floor(y)), int(np.floor(x))
        soft = (soft / np.percentile(chroma[blob], 80)).clip(0, 1)
        window = np.pad(soft, pad)[top_row + 1 : top_row + 1 + WINDOW, left + 1 : left + 1 + WINDOW].ravel()
        if window.sum() < 0.95 * soft.sum():
            return None  # larger than any shape
        overlap = np.minimum(bank, window).sum(1) / np.maximum(bank, window).sum(1)
        best = int(overlap.argmax())
        if share.max() < PURITY or overlap[best] < OVERLAP:
            return None
        objects.append(Object(names[best][0], list(HUES)[int(share.argmax())], float(x), float(y), names[best][1]))
    return objects


def check(image, caption: str) -> bool:
    """Whether the image shows exactly what the caption says.

    image: uint8 [32, 32, 3], or float [3, 32, 32] in [0, 1], as a numpy array or a tensor.
    """
    objects = find_objects(image)
    return objects is not None and satisfies(objects, parse(caption))


def check_batch(images, captions: list[str]) -> np.ndarray:
    """`check` for each image and its caption: bool [B]."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions; one caption for each image is needed")
    return np.array([check(image, caption) for image, caption in zip(images, captions, strict=True)])


def load_checker(captions: Iterable[str]) -> Callable:
    """The scorer (images [B, 3, 32, 32] in [0, 1], captions) -> [B] float32, 1 or 0, of `flowbp.evaluation`.

    captions: all that will be judged. Raises ValueError for a text that is no caption of this world.
    """
    import torch

    for caption in captions:
        try:
            parse(caption)
        except ValueError as error:
            rule = "evaluation.checker=shapes judges captions of its world alone, others take null"
            raise ValueError(f"{rule}: {error}") from error
    return lambda images, texts: torch.from_numpy(check_batch(images.cpu(), texts).astype(np.float32))
