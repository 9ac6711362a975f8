"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP reads prompt and image together, and a linear head rates them.

The weights of ImageReward.pt are renamed into transformers' `BlipVisionModel` and `BlipTextModel` when they are loaded.
Key names and constants are from the published source; the real checkpoint was not loaded here.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from flowbp.rewards.aesthetic import rating_head
from flowbp.rewards.preprocessing import fit_short_side, normalise
from flowbp.rewards.weights import below, encoder_sizes, frozen_model, read_state_dict, renamed


class ImageReward:
    """Standardised human preference, about -2 to 2; mean 0 and deviation 1 over the training data.

    model: a folder with ImageReward.pt (or .safetensors).  tokenizer: a folder with that of bert-base-uncased.
    Prompts are cut at 35 tokens.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score
    MAX_TOKENS = 35
    VISION_HEADS, TEXT_HEADS = 16, 12  # of ViT-L/16 and BERT base: the sizes that the weights' shapes do not tell

    def __init__(self, model: str | Path, tokenizer: str | Path, device: str = "cpu", dtype: str = "float32"):
        state, dtype = read_state_dict(model, "ImageReward"), getattr(torch, dtype)
        self.vision = vision_model(state, self.VISION_HEADS, dtype).to(device)
        self.text = text_model(state, self.TEXT_HEADS, dtype).to(device)
        self.head = rating_head(below(state, "mlp.layers.", "ImageReward"), dtype).to(device)
        self.tokenizer = BertTokenizer.from_pretrained(tokenizer, local_files_only=True)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalise(fit_short_side(images, self.vision.config.image_size))
        image = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        padding = {"padding": "max_length", "truncation": True, "max_length": self.MAX_TOKENS}
        tokens = self.tokenizer(prompts, return_tensors="pt", return_token_type_ids=False, **padding)
        states = self.text(**tokens.to(self.text.device), encoder_hidden_states=image).last_hidden_state
        score = self.head(states[:, 0].to(self.head[0].weight.dtype)).squeeze(-1)
        return (score - self.MEAN) / self.STD


def vision_model(state: dict[str, Tensor], heads: int, dtype: torch.dtype):
    """BLIP's image encoder in the weights of ImageReward, frozen; sizes are read off the weights."""
    state = renamed(below(state, "blip.visual_encoder.", "ImageReward"), "BLIP")
    config = BlipVisionConfig(**encoder_sizes(state, "BLIP image", heads), layer_norm_eps=1e-6)
    return frozen_model(BlipVisionModel, config, state, dtype, "ImageReward")


def text_model(state: dict[str, Tensor], heads: int, dtype: torch.dtype):
    """BLIP's text encoder with cross-attention to the image, frozen. Its weights have transformers' names already."""
    state = below(state, "blip.text_encoder.", "ImageReward")
    state.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    config = BlipTextConfig(**encoder_sizes(state, "BLIP text", heads))
    return frozen_model(BlipTextModel, config, state, dtype, "ImageReward", add_pooling_layer=False)
