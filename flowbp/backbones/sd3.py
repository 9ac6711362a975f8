"""Stable Diffusion 3 and 3.5: latents [B, C, H/8, W/8], static timestep shift, true classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbp.guidance import Conditioning

__all__ = ["SD3Backbone"]


class SD3Backbone:
    """The SD3 class of diffusers: `SD3Transformer2DModel`, `AutoencoderKL`, two CLIP encoders and optionally T5."""

    lora_targets = [
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    ]

    def __init__(self, pipe, max_sequence_length: int = 256):
        self.pipe, self.max_sequence_length = pipe, max_sequence_length
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipe.transformer

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.denoiser.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        self.pipe.scheduler.set_timesteps(num_steps)  # shifts its levels once more on top of the shifted range: read them, do not rebuild
        return self.pipe.scheduler.sigmas.cpu().clone()

    def noise(self, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
        channels = self.denoiser.config.in_channels
        device = self.denoiser.device
        return self.pipe.prepare_latents(len(generators), channels, height, width, torch.float32, device, generators)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        timestep = (sigma.float() * 1000).expand(len(x))
        v = self.denoiser(hidden_states=x.to(self.denoiser.dtype), timestep=timestep, return_dict=False, **conditioning)[0]
        return v.to(x.dtype)

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = x / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(images.float(), output_type="pt")
