"""Preprocessing on tensors: the same picture as Pillow and the Hugging Face processors make, with a gradient to every
pixel.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import images
from transformers import CLIPImageProcessor

from flowbp.rewards.preprocessing import CLIP_MEAN, CLIP_STD, fit_long_side, fit_short_side, normalise, resize

SIZE = 28
TOLERANCE = {"smooth": 0.02, "noise": 0.08}  # largest difference in normalised units; Pillow rounds to 8 bits
CASES = [(kind, *shape) for kind in TOLERANCE for shape in ((64, 64), (50, 75), (75, 50))] + [("smooth", 20, 24)]


def picture(kind, height, width):
    """[1, 3, H, W] in [0, 1], at 8-bit levels."""
    x = (
        images(height, width, batch=1)
        if kind == "smooth"
        else torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    )
    return (x * 255).round() / 255


def pil(x):
    return Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("kind", "height", "width"), CASES)
def test_short_side_preprocessing_equals_the_clip_image_processor(kind, height, width):
    x = picture(kind, height, width)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = processor(pil(x), return_tensors="pt").pixel_values
    assert (normalise(fit_short_side(x, SIZE)) - expected).abs().max() < TOLERANCE[kind]


@pytest.mark.parametrize(
    ("height", "width", "size", "published", "clip"),
    [(1216, 832, 224, (52, 0), (51, 0)), (832, 1216, 224, (0, 52), (0, 51)), (28, 31, 28, (0, 2), (0, 1))],
)
def test_the_centre_crop_halves_to_even_as_torchvision_does_or_floors_as_transformers_does(
    height, width, size, published, clip
):
    """torchvision.transforms.CenterCrop(224) takes rows 52 to 276 of the 327 that 832 x 1216 pixels leave."""
    short = min(height, width)
    rows, columns = height * size // short, width * size // short
    x = resize(images(height, width, batch=1), rows, columns)
    for (top, left), floor in ((published, False), (clip, True)):
        assert torch.equal(fit_short_side(x, size, floor), x[..., top : top + size, left : left + size].clamp(0, 1))
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    x = (x.clamp(0, 1) * 255).round() / 255
    expected = processor(pil(x), return_tensors="pt").pixel_values
    torch.testing.assert_close(normalise(fit_short_side(x, size, floor=True)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "rows"), [(832, 1216, True), (1216, 832, False)])
def test_a_large_picture_has_the_margins_of_hpsv2s_own_transform(height, width, rows):
    """ResizeMaxSize(224) of hpsv2 1.2.0: 832 becomes 153, between 35 and 36 black pixels."""
    fitted = fit_long_side(torch.ones(1, 3, height, width), 224)[0, 0]
    filled = torch.zeros(224, 224)
    filled[35:188] = 1
    torch.testing.assert_close(fitted, filled if rows else filled.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "height", "width"), CASES)
def test_long_side_preprocessing_equals_pillow_on_a_black_square(kind, height, width):
    x = picture(kind, height, width)
    height, width = (round(side * SIZE / max(height, width)) for side in (height, width))
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(pil(x).resize((width, height), Image.BICUBIC), ((SIZE - width) // 2, (SIZE - height) // 2))
    expected = (np.asarray(square) / 255 - CLIP_MEAN) / CLIP_STD
    got = normalise(fit_long_side(x, SIZE).clamp(0, 1))[0].permute(1, 2, 0)
    assert np.abs(got.numpy() - expected).max() < TOLERANCE[kind]


@pytest.mark.parametrize("fit", [fit_short_side, fit_long_side])
def test_the_gradient_of_preprocessing_is_right(fit):
    x = images(9, 12, batch=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise(fit(x, 7)), x)


def test_resizing_is_done_in_float32_and_leaves_a_picture_of_the_right_size_alone():
    x = images(28, 28)
    assert resize(x.bfloat16(), 14, 14).dtype == torch.float32
    assert (
        torch.equal(resize(x, 28, 28), x)
        and torch.equal(fit_short_side(x, 28), x)
        and torch.equal(fit_long_side(x, 28), x)
    )


def test_the_overshoot_of_bicubic_at_an_edge_is_clipped_as_in_an_8_bit_picture():
    x = (torch.arange(40) < 20).float().expand(1, 3, 40, 40)
    assert resize(x, 28, 28).max() > 1.005 and resize(x, 28, 28).min() < -0.005
    assert fit_short_side(x, 28).max() == 1 and fit_short_side(x, 28).min() == 0
