"""What a Qwen2-VL or Qwen2.5-VL reads, made from image tensors: patches with a gradient to every pixel, and the
conversation around them.

The processor of transformers cannot serve here, because it takes pictures and cuts the gradient. Patches are 14 x 14
pixels; 2 x 2 of them are merged into one token of the language model. A still image is given as two equal frames.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from flowbp.rewards.preprocessing import normalise, resize

PATCH, MERGE, FRAMES = 14, 2, 2
CELL = PATCH * MERGE  # pixels, on a side, of one token
IMAGE_TOKEN = "<|image_pad|>"


def smart_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of 28, near the picture's own shape, with min_pixels to max_pixels pixels."""
    rounded = [max(CELL, round(side / CELL) * CELL) for side in (height, width)]
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [max(CELL, math.floor(side / shrink / CELL) * CELL) for side in (height, width)]
    elif math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / CELL) * CELL for side in (height, width)]
    return rounded[0], rounded[1]


def patchify(images: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, H, W], H and W multiples of 28 -> patches [B * H/14 * W/14, 3 * 2 * 14 * 14], grid [B,
    3].

    The four patches of a token follow one another; tokens are in reading order. grid: frames, rows and columns of
    patches.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    x = images.reshape(batch, channels, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    # Batch, token row, token column, row and column within the token, channel, pixel row, pixel column.
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], FRAMES, *x.shape[6:])
    patches = x.reshape(batch * rows * columns, channels * FRAMES * PATCH * PATCH)
    return patches, torch.tensor([[1, rows, columns]] * batch, device=images.device)


def conversation(text: str, image_tokens: int, answer: str = "") -> str:
    """A user's turn of an image and `text` in Qwen's chat format, then the beginning of the assistant's answer."""
    image = f"<|vision_start|>{IMAGE_TOKEN * image_tokens}<|vision_end|>"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n{answer}"
    )


def instruction(folder: str | Path, published: str, *needed: str) -> str:
    """The text of instruction.txt in `folder`: what the model was trained to be asked, with {prompt} for the caption.

    Wording and blanks matter as the weights do, and the text belongs to the model's authors. So it is not part of this
    package: the user fetches it from where it is published. Raises FileNotFoundError when the file is absent, and
    ValueError unless {prompt} and each of `needed` occur in it exactly once.
    """
    path = Path(folder, "instruction.txt")
    if not path.is_file():
        what = "the text that the model was trained to be asked, with {prompt} where the caption goes"
        way_out = f"published in {published}; save it, blanks and line ends included, in a folder of your own, model="
        raise FileNotFoundError(f"{path} is missing: {what}, {way_out}")
    text = path.read_text(encoding="utf-8")
    for mark in ("{prompt}", *needed):
        if text.count(mark) != 1:
            raise ValueError(f"{path} must hold {mark} once, and holds it {text.count(mark)} times")
    return text


def inputs(
    tokenizer, dtype: torch.dtype, images: Tensor, texts: list[str], min_pixels: int, max_pixels: int, answer: str = ""
) -> dict[str, Tensor]:
    """The model's arguments for images [B, 3, H, W] in [0, 1] with one text each. Texts are padded on the right."""
    height, width = smart_size(*images.shape[-2:], min_pixels, max_pixels)
    patches, grid = patchify(normalise(resize(images, height, width).clamp(0, 1)))
    turns = [conversation(text, (height // CELL) * (width // CELL), answer) for text in texts]
    encoded = tokenizer(turns, padding=True, padding_side="right", return_tensors="pt").to(images.device)
    return {
        "input_ids": encoded.input_ids,
        "attention_mask": encoded.attention_mask,
        "mm_token_type_ids": (encoded.input_ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int(),
        "pixel_values": patches.to(dtype),
        "image_grid_thw": grid,
    }
