"""Rewards of the CLIP class: the similarity of an image and its prompt in a joint embedding space (CLIPScore,
PickScore).
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from flowbp.rewards.preprocessing import CLIP_MEAN, CLIP_STD, fit_short_side, normalise
from flowbp.rewards.weights import load_frozen


class CLIPEncoder:
    """A frozen `CLIPModel`, with the tokenizer where prompts are read too. Differentiable in the pixels.

    Images are resized so that the short side fits the model, centre-cropped and normalised.
    """

    mean, std, floor = CLIP_MEAN, CLIP_STD, False  # floor: see `fit_short_side`

    def __init__(self, model, tokenizer=None):
        self.model, self.tokenizer = model, tokenizer

    @property
    def size(self) -> int:
        return self.model.config.vision_config.image_size

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        return normalise(fit_short_side(images, self.size, self.floor), self.mean, self.std)

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(image_features(self.model, self.preprocess(images)), dim=-1)

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarity [B] of images and their prompts, float32 or the model's float64."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        image = image_features(self.model, self.preprocess(images))
        return F.cosine_similarity(image, text.to(image.dtype), dim=-1)


class CLIPReward(CLIPEncoder):
    """Cosine similarity of a `CLIPModel`'s image and text embeddings, in [-1, 1].

    This is CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor of 2.5 and its cut at 0.

    model: a folder with model, tokenizer and image processor.  dtype: of the weights; the score is float32.
    Images are preprocessed as the model's own processor does it, without its rounding to 8 bits.
    """

    floor = True

    def __init__(self, model: str | Path, device: str = "cpu", dtype: str = "float32"):
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        super().__init__(load_frozen(CLIPModel, model, torch.float32), tokenizer)
        # Read before the weights are cast: bfloat16 would round ln 100 to 4.59375, and so 100 to 98.9.
        self.temperature = self.model.logit_scale.exp().item()
        self.model.to(device, getattr(torch, dtype))
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.cosine(images, prompts)


class PickScore(CLIPReward):
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) times the cosine, about 17 to 25 for a
    logit scale of ln 100.

    A ViT-H/14 `CLIPModel` fine-tuned on human choices. The real checkpoint was not loaded here.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.temperature * self.cosine(images, prompts)


def image_features(model, pixels: Tensor) -> Tensor:
    """[B, d] of normalised pixels [B, 3, size, size] under a `CLIPModel`, float32 or the model's float64; not of unit
    length.
    """
    features = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output
    return features.to(torch.promote_types(features.dtype, torch.float32))
