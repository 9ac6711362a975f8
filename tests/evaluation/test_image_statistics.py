"""Image statistics of pictures whose values are known."""

import math

import pytest
import torch

from flowbp.image_statistics import diversity, high_frequency, saturation, thumbnails

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


def test_a_mirrored_image_has_the_high_frequencies_of_the_image():
    images = torch.rand(4, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    for axis in (2, 3):
        assert high_frequency(images.flip(axis)).tolist() == pytest.approx(high_frequency(images).tolist(), rel=1e-4)


def test_saturation_is_that_of_hsv():
    colours = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [1.0, 0.5, 0.5], [0.2, 0.4, 0.1]])
    assert saturation(colours[:, :, None, None].expand(-1, -1, 4, 6)).tolist() == pytest.approx(
        [1.0, 0.0, 0.0, 0.5, 0.75]
    )


def test_diversity_is_the_mean_pairwise_distance_of_the_images_of_a_prompt():
    embeddings = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    prompts = ["a", "b", "a", "c", "a", "b", "d"]
    found = diversity(embeddings, prompts)
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=2)
    assert found[[0, 2, 4]].mean().item() == pytest.approx(1 - (cosine[0, 2] + cosine[0, 4] + cosine[2, 4]).item() / 3)
    assert found[[1, 5]].tolist() == pytest.approx([1 - cosine[1, 5].item()] * 2)
    assert found[[3, 6]].isnan().all(), "the only image of a prompt has no diversity"
    assert found[[0, 2, 4]].mean().item() == pytest.approx(embeddings[[0, 2, 4]].var(dim=0).sum().item())
    assert diversity(embeddings[[1] * 4], ["a"] * 4).tolist() == [0.0] * 4
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(diversity(embeddings[order], [prompts[i] for i in order]), found[order], equal_nan=True)


def test_without_an_encoder_the_distance_is_that_of_pixels():
    black, white = torch.zeros(1, 3, 40, 40), torch.ones(1, 3, 40, 40)
    assert diversity(thumbnails(torch.cat([black, white])), ["a"] * 2).tolist() == pytest.approx([1.0] * 2)
    images = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    assert diversity(thumbnails(images), ["a"] * 2)[0].item() == pytest.approx(
        (images[0] - images[1]).square().mean().item()
    )
