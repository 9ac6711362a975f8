"""Image statistics of pictures whose values are known."""

import math

import pytest
import torch

from flowbp.image_statistics import diversity, high_frequency, saturation

ROWS, COLUMNS = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")


def grey(pattern):
    return pattern.float().expand(1, 3, *pattern.shape)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (grey(torch.full((64, 64), 0.3)), 0.0),
        (grey((ROWS + COLUMNS) % 2), 1.0),
        (grey(ROWS % 2), 1.0),
        (grey(0.5 + 0.5 * torch.sin(2 * math.pi * ROWS / 16)), 0.0),
        (grey(0.5 + 0.5 * torch.sin(2 * math.pi * ROWS * 3 / 8)), 1.0),
        (grey(ROWS / 63), 0.0),  # a ramp: borders are no edges
        (torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 1 - math.pi / 16),
    ],
    ids=["constant", "checkerboard", "stripes", "wave of 16 pixels", "wave of 8/3 pixels", "ramp", "white noise"],
)
def test_high_frequency_is_the_share_of_power_above_half_of_nyquist(image, expected):
    assert high_frequency(image).mean().item() == pytest.approx(expected, abs=0.01)


def test_saturation_is_that_of_hsv():
    colours = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [1.0, 0.5, 0.5], [0.2, 0.4, 0.1]])
    assert saturation(colours[:, :, None, None].expand(-1, -1, 4, 6)).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5, 0.75])


def test_diversity_is_the_mean_distance_to_the_other_images():
    black, white = torch.zeros(1, 3, 40, 40), torch.ones(1, 3, 40, 40)
    assert diversity(torch.cat([black, black, black])).tolist() == [0.0] * 3
    assert diversity(torch.cat([black, white])).tolist() == [1.0] * 2
    assert diversity(torch.cat([black, black, white])).tolist() == pytest.approx([0.5, 0.5, 1.0])
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    by_hand = [(a - b).square().mean().sqrt() for i, a in enumerate(images) for b in images[:i]]
    assert diversity(images).mean().item() == pytest.approx(sum(by_hand).item() / 10)
    with pytest.raises(ValueError, match="at least two"):
        diversity(black)
