"""FLUX.2 [klein]: latents [B, 128, H/16, W/16], one token a position; classifier-free guidance in two network calls, or
none for a distilled model.

The VAE's 32 channels are cut into 2 x 2 patches and whitened by running statistics: these are the 128 channels.
"""

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F

from flowbp.backbones.base import JOINT_ATTENTION, Backbone, grid_ids
from flowbp.guidance import Conditioning


class Flux2Backbone(Backbone):
    """`Flux2KleinPipeline`: `Flux2Transformer2DModel`, `AutoencoderKLFlux2` and Qwen3, hidden states 9, 18 and 27."""

    @property
    def guidance_branches(self) -> str:
        return "none" if self.pipe.config.is_distilled else "separate"

    @property
    def lora_targets(self) -> list[str]:
        """Attention of the double blocks, and both fused projections of the single blocks, which hold most of the
        weights.
        """
        # Each single block is named in full: "attn.to_out" would match the ModuleLists of the double blocks too.
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.denoiser.config.num_single_layers)]
        return [*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", *single]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        self.warn_of_cut(prompts, enable_thinking=False)
        embeds, _ = self.pipe.encode_prompt(prompts, device=self.text_device, **self.text_options)
        return {"encoder_hidden_states": embeds}

    def shift(self, num_steps: int, num_tokens: int) -> float:
        return compute_empirical_mu(num_tokens, num_steps)

    def latent_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        return self.denoiser.config.in_channels, rows, columns

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, text = self.denoiser.dtype, conditioning["encoder_hidden_states"]
        image_ids = grid_ids(1, *x.shape[2:], 1, device=x.device)  # (time, row, column, position in the prompt)
        text_ids = grid_ids(1, 1, 1, text.shape[1], device=x.device)
        v = self.denoiser(
            hidden_states=x.to(dtype).flatten(2).mT,
            timestep=(sigma * 1000).expand(len(x)).to(dtype) / 1000,  # the pipeline rounds 1000 sigma, not sigma
            img_ids=image_ids.expand(len(x), -1, -1),
            txt_ids=text_ids.expand(len(x), -1, -1),
            return_dict=False,
            **conditioning,
        )[0]
        return v.mT.reshape(x.shape)

    def vae_latents(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(x.dtype)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(x.dtype)
        return F.pixel_shuffle(x * std + mean, 2)
