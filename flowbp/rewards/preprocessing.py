"""Differentiable image preprocessing: what reward models do to 8-bit pictures, on tensors, with a gradient to every
pixel.

Images are [B, 3, H, W] in [0, 1]. Resizing is bicubic, antialiased, in float32 (float64 stays), because a bfloat16
resize is too coarse and not implemented on every device. Pillow rounds to 8 bits and clips after each of its two
passes. The difference to Pillow, in normalised units, is at most .02 for a reduced smooth picture, .08 for reduced
pixel noise, and .25 for enlarged pixel noise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, height, width], float32 or float64. Bicubic resizing overshoots [0, 1] a little at edges;
    the result is not clamped.
    """
    images = images if images.dtype == torch.float64 else images.float()
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def fit_short_side(images: Tensor, size: int, floor: bool = False) -> Tensor:
    """[B, 3, size, size] in [0, 1]: the short side resized to `size`, the long side cropped around the centre (CLIP,
    BLIP).

    floor: an odd rest is halved downwards, as in transformers' CLIPImageProcessor, and not to even, as in torchvision.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = height * size // short, width * size // short
    top, left = ((side - size) // 2 if floor else round((side - size) / 2) for side in (height, width))
    return resize(images, height, width)[..., top : top + size, left : left + size].clamp(0, 1)


def fit_long_side(images: Tensor, size: int) -> Tensor:
    """[B, 3, size, size]: the long side resized to `size`, the short side padded with black on both ends (HPSv2). Not
    clamped.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(resize(images, height, width), (left, size - width - left, top, size - height - top))


def normalise(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """(images - mean) / std, channel by channel."""
    mean, std = (torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std
