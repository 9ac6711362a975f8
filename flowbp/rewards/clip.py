"""Rewards of the CLIP class: the similarity of an image and its prompt in a joint embedding space (CLIPScore,
PickScore).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowbp.rewards.preprocessing import fit_short_side, normalise

__all__ = ["CLIPReward", "PickScore", "cosine_similarity", "image_features"]


class CLIPReward:
    """Cosine similarity of a `CLIPModel`'s image and text embeddings, in [-1, 1]; frozen, differentiable in the pixels.

    This is CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor of 2.5 and its cut at 0.

    model: a folder with model, tokenizer and image processor. dtype: of the weights; the score is float32.
    Images are resized so that the short side fits the model, centre-cropped and normalised, as the model's processor
        does on 8-bit images.
    """

    def __init__(self, model: str | Path, device: str = "cpu", dtype: str = "float32"):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model = (
            CLIPModel.from_pretrained(model, local_files_only=True, dtype=torch.float32).eval().requires_grad_(False)
        )
        self.temperature = (
            self.model.logit_scale.exp().item()
        )  # bfloat16 would round ln 100 to 4.59375, and 100 to 98.9
        self.model.to(device, getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self.size = self.model.config.vision_config.image_size
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return cosine_similarity(self.model, self.tokenizer, self.preprocess(images), prompts)

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(image_features(self.model, self.preprocess(images)), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        return normalise(fit_short_side(images, self.size), self.mean, self.std)


class PickScore(CLIPReward):
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) times the cosine, about 17 to 25 for a
    logit scale of ln 100.

    A ViT-H/14 `CLIPModel` fine-tuned on human choices. The real checkpoint was not loaded here.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.temperature * super().__call__(images, prompts)


def cosine_similarity(model, tokenizer, pixels: Tensor, prompts: list[str]) -> Tensor:
    """[B] in [-1, 1], float32 or the model's float64, of normalised pixels [B, 3, size, size] and their prompts under a
    `CLIPModel`.
    """
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(model.device)
    image, text = image_features(model, pixels), model.get_text_features(**tokens).pooler_output
    return F.cosine_similarity(image, text.to(image.dtype), dim=-1)


def image_features(model, pixels: Tensor) -> Tensor:
    """[B, d] of normalised pixels [B, 3, size, size] under a `CLIPModel`, float32 or the model's float64; not of unit
    length.
    """
    features = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output
    return features.to(torch.promote_types(features.dtype, torch.float32))
