"""What images look like, whatever their prompt: metrics that show when a reward is exploited instead of satisfied.

Two judge an image alone, (images [B, 3, H, W] in [0, 1], prompts) -> [B] float32. `diversity` compares the images of
one prompt. For none of them is higher "better": a change is what tells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flowbp.given import IMAGE_STATISTICS

THUMBNAIL = 32  # pixels a side; images are compared by their composition, not by their texture


def diversity(embeddings: Tensor, prompts: Sequence[str]) -> Tensor:
    """How far each of n images is from the m - 1 others of its prompt, [n] float64, from embeddings [n, d] float32:

        d_i = 1 / (m - 1) sum_{j != i} |e_i - e_j|^2 / 2

    For unit vectors this is the average of 1 - cosine. It is nan for the only image of a prompt. The mean of d_i over a
    prompt's images is their mean pairwise distance, as in Sadat et al. 2024 (arXiv 2310.17347), and the unbiased
    variance of their embeddings: more images of a prompt do not change what is estimated. 0: a prompt gives one image,
    whatever the seed.
    """
    distances = torch.full((len(prompts),), float("nan"), dtype=torch.float64)
    images: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        images.setdefault(prompt, []).append(i)
    for rows in images.values():
        if len(rows) > 1:
            e = embeddings[rows].double()
            # sum_j |e_i - e_j|^2 = m |e_i - mean|^2 + sum_j |e_j - mean|^2
            squares = (e - e.mean(dim=0)).square().sum(dim=1)
            distances[rows] = (len(rows) * squares + squares.sum()) / (2 * (len(rows) - 1))
    return distances


def thumbnails(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Embeddings [B, d] where no encoder is at hand: 32 x 32 pixels or fewer.

    |e_i - e_j|^2 / 2 is the mean squared difference of two images.
    """
    height, width = images.shape[-2:]
    small = F.interpolate(images.float(), (min(height, THUMBNAIL), min(width, THUMBNAIL)), mode="area").flatten(1)
    return small * (2 / small.shape[1]) ** 0.5


def saturation(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Mean over pixels of (max - min) / max of R, G, B: the S of HSV (Smith 1978).

    0: grey; 1: pure hues. Black counts as grey.
    """
    top, bottom = images.float().amax(dim=1), images.float().amin(dim=1)
    return ((top - bottom) / top.clamp(min=1e-6)).mean(dim=(1, 2))


def high_frequency(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Share of the luminance's spectral power above half the Nyquist frequency (more than 1/4 cycle a pixel, in any
    direction).

    The power spectrum is that of Y = .299 R + .587 G + .114 B without its mean, under a Hann window, so that borders do
    not count as edges. 0: smooth or constant; 1: a checkerboard of pixels; .80: white noise, the share of the plane
    above that radius. Grids and fringes left by upsampling layers and by adversarial pixel patterns lie in this band
    (Durall et al. 2020; Frank et al. 2020).
    """
    y = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114], device=images.device), images.float())
    height, width = y.shape[-2:]
    rows, columns = (torch.hann_window(n, False, device=y.device) for n in (height, width))
    window = rows[:, None] * columns
    y = (y - (window * y).sum(dim=(1, 2), keepdim=True) / window.sum()) * window
    power = torch.fft.fft2(y).abs().square()
    fy, fx = torch.fft.fftfreq(height, device=y.device)[:, None], torch.fft.fftfreq(width, device=y.device)
    total = power.sum(dim=(1, 2))
    high = (power * (fy.square() + fx.square() > 1 / 16)).sum(dim=(1, 2))
    return torch.where(total > 1e-6 * height * width, high / total.clamp(min=1e-12), torch.zeros_like(total))


OF_ONE_IMAGE = dict(zip(IMAGE_STATISTICS, (saturation, high_frequency), strict=False))
