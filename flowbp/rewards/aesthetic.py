"""The LAION aesthetic predictor v2: a linear regression of human ratings on CLIP ViT-L/14 image embeddings. Ignores the
prompt.

Source: github.com/christophschuhmann/improved-aesthetic-predictor. Head shape and key names are from the published
    source; the real
checkpoint was not loaded here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowbp.rewards.clip import image_features
from flowbp.rewards.files import read_state_dict
from flowbp.rewards.preprocessing import fit_short_side, normalise

__all__ = ["AestheticReward", "rating_head"]


class AestheticReward:
    """Predicted mean rating on a scale of 1 to 10, mostly 4 to 7.

    model: a folder with sac+logos+ava1-l14-linearMSE.pth (or .safetensors); clip: a folder with OpenAI's CLIP ViT-L/14
        for transformers.
    """

    def __init__(self, model: str | Path, clip: str | Path, device: str = "cpu", dtype: str = "float32"):
        from transformers import CLIPModel

        self.clip = (
            CLIPModel.from_pretrained(clip, local_files_only=True, dtype=getattr(torch, dtype))
            .eval()
            .requires_grad_(False)
        )
        self.clip.to(device)
        state = read_state_dict(model, "sac+logos+ava1-l14-linearMSE")
        self.head = rating_head(
            {key.removeprefix("layers."): value for key, value in state.items()}, self.clip.dtype
        ).to(device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.embed(images)).squeeze(-1)

    def embed(self, images: Tensor) -> Tensor:
        pixels = normalise(fit_short_side(images, self.clip.config.vision_config.image_size))
        return F.normalize(image_features(self.clip, pixels), dim=-1)


def rating_head(state: dict[str, Tensor], dtype: torch.dtype) -> nn.Sequential:
    """The frozen head that the aesthetic predictor and ImageReward share: d -> 1024 -> 128 -> 64 -> 16 -> 1, with no
    nonlinearity.

    state: "0.weight" and so on; dropout held the places 1, 3 and 5. Runs in float32 at least.
    """
    width = state["0.weight"].shape[1]
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64), nn.Identity(),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    head.load_state_dict(state)
    return head.to(torch.promote_types(dtype, torch.float32)).eval().requires_grad_(False)
