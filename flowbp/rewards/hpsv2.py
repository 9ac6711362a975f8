"""HPSv2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine of a ViT-H/14 CLIP fine-tuned on human preferences.

The checkpoint is open_clip's. Its weights are renamed into transformers' `CLIPModel` when it is loaded, so that neither
open_clip nor hpsv2 is needed. Key names and transform are from the published source; the real checkpoint was not loaded
here.
"""

import html
import re
import unicodedata
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from flowbp.rewards.clip import CLIPEncoder
from flowbp.rewards.preprocessing import fit_long_side, normalise
from flowbp.rewards.weights import encoder_sizes, frozen_model, read_state_dict, renamed


class HPSv2(CLIPEncoder):
    """Cosine similarity of image and prompt, about .2 to .4; images of current models lie near .29.

    model: a folder with HPS_v2.1_compressed.pt (or .safetensors).  tokenizer: a folder with CLIP's tokenizer.
    The transform is HPSv2's own. The LONG side is resized to the model's size and the rest is padded with black before
    normalising, so that nothing of a wide image is cropped away. (Its mask-aware normalisation spares a fourth channel;
    for RGB it is the ordinary one.)
    """

    HEADS = 16  # of ViT-H/14, image and text alike; the one size that the weights' shapes do not tell

    def __init__(self, model: str | Path, tokenizer: str | Path, device: str = "cpu", dtype: str = "float32"):
        state = read_state_dict(model, "HPS_v2.1_compressed")
        clip = clip_from_open_clip(state.get("state_dict", state), self.HEADS, getattr(torch, dtype))
        super().__init__(clip.to(device), AutoTokenizer.from_pretrained(tokenizer, local_files_only=True))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.cosine(images, [clean(prompt) for prompt in prompts])

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        return normalise(fit_long_side(images, self.size))


STRAIGHT = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)
COMPATIBLE = re.compile("[\ufb00-\ufb06\uff01-\uffef]+")  # ligatures; full-width and half-width forms


def clean(prompt: str) -> str:
    """A prompt as the published tokenizer reads it: HTML's entities resolved, straight quotes, plain letters for
    ligatures and wide forms, single spaces. (It repairs mojibake too, by ftfy; this does not.)
    """
    text = html.unescape(html.unescape(prompt)).translate(STRAIGHT)
    text = COMPATIBLE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return " ".join(text.split())


def clip_from_open_clip(state: dict[str, Tensor], heads: int, dtype: torch.dtype = torch.float32):
    """A frozen `CLIPModel` with the weights of an open_clip ViT. Sizes are read off the weights; activations are exact
    GELUs.

    heads: attention heads of both towers. Raises ValueError when a weight is missing or left over.
    """
    weights = {}
    for key, value in renamed(state, "open_clip").items():
        if key in ("visual_projection.weight", "text_projection.weight"):
            weights[key] = value.T.contiguous()  # stored as [width, embedding]
        elif ".in_proj_" in key:  # q, k and v in one
            for name, part in zip("qkv", value.chunk(3), strict=True):
                weights[key.replace(".in_proj_", f".{name}_proj.")] = part.contiguous()
        else:
            weights[key] = value

    try:
        encoders = "CLIP image", "CLIP text"
        vision, text = (encoder_sizes(weights, name, heads) | {"hidden_act": "gelu"} for name in encoders)
        embedding = len(weights["visual_projection.weight"])
    except KeyError as error:
        raise ValueError(f"these are not the weights of an open_clip ViT: there is no {error}") from None
    text["eos_token_id"] = text["vocab_size"] - 1
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=embedding)
    return frozen_model(CLIPModel, config, weights, dtype, "an open_clip ViT")
