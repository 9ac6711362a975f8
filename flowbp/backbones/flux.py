"""FLUX.1: latents [B, 16, H/8, W/8], which the network reads as 2 x 2 patches.

FLUX.1-dev was distilled from a guided model: its network takes a guidance scale as input, `guidance.embedded`.
FLUX.1-schnell takes none.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowbp.backbones.base import JOINT_ATTENTION, Backbone, grid_ids
from flowbp.guidance import Conditioning


class FluxBackbone(Backbone):
    """`FluxPipeline`: `FluxTransformer2DModel`, `AutoencoderKL`, a CLIP encoder (pooled) and T5."""

    lora_targets = [*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]

    @property
    def embeds_guidance(self) -> bool:
        return self.denoiser.config.guidance_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        options = {"device": self.text_device} | self.text_options
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, prompt_2=None, **options)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, text = self.denoiser.dtype, conditioning["encoder_hidden_states"]
        patches = F.pixel_unshuffle(x.to(dtype), 2)  # [B, 4 C, h / 2, w / 2]
        rows, columns = patches.shape[2:]
        v = self.denoiser(
            # Contiguous as the pipeline's are: in bfloat16, the strides decide which matrix product is run.
            hidden_states=patches.flatten(2).mT.contiguous(),
            timestep=(sigma * 1000).expand(len(x)).to(dtype) / 1000,  # the pipeline rounds 1000 sigma, not sigma
            img_ids=grid_ids(1, rows, columns, device=x.device),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.int64, device=x.device),
            return_dict=False,
            **conditioning,
        )[0]
        return F.pixel_shuffle(v.mT.unflatten(2, (rows, columns)), 2)
