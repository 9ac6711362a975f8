"""Rewards of the CLIP class: the similarity of an image and its prompt in a joint embedding space (CLIPScore, PickScore, HPS)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CLIPReward"]


class CLIPReward:
    """Cosine similarity of a `CLIPModel`'s image and text embeddings, in [-1, 1]; frozen, differentiable in the pixels.

    model: a local folder or Hub id with model, tokenizer and image processor. Images are resized (bicubic, antialiased) so that the short
    side fits the model, centre-cropped and normalised, all in float32, as the model's own processor does on 8-bit images.
    """

    def __init__(self, model: str, device: str = "cpu"):
        import os

        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        local = os.path.isdir(model)
        self.model = CLIPModel.from_pretrained(model, local_files_only=local, dtype=torch.float32).eval().requires_grad_(False)
        self.model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=local)
        self.mean = torch.tensor(processor.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std, device=device).view(3, 1, 1)
        self.size = self.model.config.vision_config.image_size

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.mean.device)
        text = self.model.get_text_features(**tokens).pooler_output
        image = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return F.cosine_similarity(image, text, dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        images = images.float()
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            scale = self.size / min(height, width)
            shape = (max(round(height * scale), self.size), max(round(width * scale), self.size))
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
            top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
            images = images[..., top : top + self.size, left : left + self.size]
        return (images - self.mean) / self.std
