"""The LAION aesthetic predictor v2: a linear regression of human ratings on CLIP ViT-L/14 image embeddings. It ignores
the prompt.

Source: github.com/christophschuhmann/improved-aesthetic-predictor. Head shape and key names are from the published
source; the real checkpoint was not loaded here.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from flowbp.rewards.clip import CLIPEncoder
from flowbp.rewards.weights import frozen_head, load_frozen, read_state_dict, renamed


class AestheticReward(CLIPEncoder):
    """Predicted mean rating on a scale of 1 to 10, mostly 4 to 7.

    model: a folder with sac+logos+ava1-l14-linearMSE.pth (or .safetensors).
    clip: a folder with OpenAI's CLIP ViT-L/14 for transformers.
    """

    def __init__(self, model: str | Path, clip: str | Path, device: str = "cpu", dtype: str = "float32"):
        super().__init__(load_frozen(CLIPModel, clip, getattr(torch, dtype)).to(device))
        state = read_state_dict(model, "sac+logos+ava1-l14-linearMSE")
        self.head = rating_head(renamed(state, "LAION"), self.model.dtype).to(device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.embed(images)).squeeze(-1)


def rating_head(state: dict[str, Tensor], dtype: torch.dtype) -> nn.Sequential:
    """The linear head that the aesthetic predictor and ImageReward share: d -> 1024 -> 128 -> 64 -> 16 -> 1.

    state: "0.weight" and so on. Layers 1, 3 and 5 were dropout.
    """
    width = state["0.weight"].shape[1]
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    return frozen_head({name: nn.Linear(*size) for name, size in sizes.items()}, state, dtype)
