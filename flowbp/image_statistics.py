"""What an image looks like, whatever its prompt: the metrics that betray a reward being exploited instead of satisfied.

Each is a scorer, (images [B, 3, H, W] in [0, 1], prompts) -> [B] float32, and none is "better" when higher: what tells is a change.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IMAGE_STATISTICS", "diversity", "high_frequency", "saturation"]

THUMBNAIL = 32  # pixels a side; images are compared by their composition, not by their texture


def diversity(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Mean distance of each image to the others of its batch; its mean over the batch is the mean pairwise distance.

    d_i = 1 / (B - 1) sum_{j != i} sqrt(mean over pixels and channels of (x_i - x_j)^2), on thumbnails of at most 32 x 32 pixels. 0: the
    images are equal; 1: one is black and the other white. Mean pairwise distance is the usual measure of mode collapse (Odena et al. 2017,
    with MS-SSIM; Ruiz et al. 2023, with LPIPS); pixels need no model. Raises ValueError for a single image: it has no distance to others.
    """
    if len(images) < 2:
        raise ValueError("diversity compares the images of a batch: pass at least two")
    height, width = images.shape[-2:]
    small = F.interpolate(images.float(), (min(height, THUMBNAIL), min(width, THUMBNAIL)), mode="area").flatten(1)
    distances = torch.stack([(small - row).square().mean(dim=1).sqrt() for row in small])
    return distances.sum(dim=1) / (len(images) - 1)


def saturation(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Mean over pixels of (max - min) / max of R, G, B: the S of HSV (Smith 1978). 0: grey; 1: pure hues. Black counts as grey."""
    top, bottom = images.float().amax(dim=1), images.float().amin(dim=1)
    return ((top - bottom) / top.clamp(min=1e-6)).mean(dim=(1, 2))


def high_frequency(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Share of the luminance's spectral power above half the Nyquist frequency (more than 1/4 cycle a pixel, in any direction).

    The power spectrum of Y = .299 R + .587 G + .114 B, its mean removed, under a Hann window so that borders do not count as edges.
    0: smooth or constant; 1: a checkerboard of pixels; white noise .80, the share of the plane above that radius. Grids and fringes, left
    by upsampling layers and by adversarial pixel patterns, live there (Durall et al. 2020; Frank et al. 2020).
    """
    y = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114], device=images.device), images.float())
    height, width = y.shape[-2:]
    window = torch.hann_window(height, False, device=y.device)[:, None] * torch.hann_window(width, False, device=y.device)
    y = (y - (window * y).sum(dim=(1, 2), keepdim=True) / window.sum()) * window
    power = torch.fft.fft2(y).abs().square()
    fy, fx = torch.fft.fftfreq(height, device=y.device)[:, None], torch.fft.fftfreq(width, device=y.device)
    total = power.sum(dim=(1, 2))
    high = (power * (fy.square() + fx.square() > 1 / 16)).sum(dim=(1, 2))
    return torch.where(total > 1e-6 * height * width, high / total.clamp(min=1e-12), torch.zeros_like(total))


IMAGE_STATISTICS = {"diversity": diversity, "saturation": saturation, "high_frequency": high_frequency}
