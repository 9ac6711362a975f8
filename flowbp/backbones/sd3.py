"""Stable Diffusion 3 and 3.5: latents [B, 16, H/8, W/8], a static timestep shift, classifier-free guidance in one
batched call.
"""

import torch
from torch import Tensor

from flowbp.backbones.base import JOINT_ATTENTION, Backbone
from flowbp.guidance import Conditioning


class SD3Backbone(Backbone):
    """`StableDiffusion3Pipeline`: `SD3Transformer2DModel`, `AutoencoderKL`, two CLIP encoders and optionally T5."""

    guidance_branches = "batched"
    lora_targets = JOINT_ATTENTION
    default_text_tokens = 256
    dispatches_attention = False

    @property
    def patch(self) -> int:
        return self.denoiser.config.patch_size

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        options = {"device": self.text_device, "do_classifier_free_guidance": False} | self.text_options
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, prompt_2=None, prompt_3=None, **options)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    @property
    def prompt_tokens(self) -> int:
        return self.pipe.tokenizer_max_length + self.text_tokens  # CLIP's, then T5's

    def pipeline_levels(self, num_steps: int) -> dict:
        """The scheduler's default, which shifts an already shifted range: of 25 levels under shift 3, the last is .0089
        where the published one is .111.
        """
        return {"num_inference_steps": num_steps}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        latents, timestep = x.to(self.denoiser.dtype), (sigma * 1000).expand(len(x))
        return self.denoiser(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]
