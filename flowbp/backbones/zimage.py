"""Z-Image: latents [B, 16, H/8, W/8] in float32, prompts of different lengths, classifier-free guidance in one batched
call.

The network's time runs from noise (0) to image (1), and its output is minus the velocity. The pipeline guides by
v_pos + w (v_pos - v_neg): its guidance_scale w is `guidance.scale` less 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowbp.backbones.base import Backbone
from flowbp.guidance import Conditioning


class ZImageBackbone(Backbone):
    """`ZImagePipeline`: `ZImageTransformer2DModel`, `AutoencoderKL` and Qwen3, of which it reads the last hidden state
    but one.
    """

    guidance_branches = "batched"
    capturable = False
    pipeline_dtype = torch.float32
    lora_targets = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [B, max_sequence_length, D], which are 0 from each prompt's length on, and the lengths [B]."""
        options = {"device": self.text_device, "max_sequence_length": self.text_tokens}
        prompts = list(prompts)  # a copy, because the pipeline writes its chat template into the list
        self.warn_of_cut(prompts, enable_thinking=True)
        embeds, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        lengths = [len(embed) for embed in embeds]
        padded = [F.pad(embed, (0, 0, 0, self.text_tokens - len(embed))) for embed in embeds]
        return {"embeds": torch.stack(padded), "lengths": torch.tensor(lengths, device=embeds[0].device)}

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeds": (self.text_tokens, self.denoiser.config.cap_feat_dim), "lengths": ()}

    def pipeline_levels(self, num_steps: int) -> dict:
        """The published levels, as torch computes them in float32."""
        return {"sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist()}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        images = x.to(self.denoiser.dtype).unsqueeze(2).unbind()  # [C, 1, h, w] each: one frame
        time = ((1000 - sigma * 1000) / 1000).expand(len(x))
        lengths = conditioning["lengths"].tolist()
        texts = [embed[:length] for embed, length in zip(conditioning["embeds"], lengths, strict=True)]
        v = self.denoiser(list(images), time, texts, return_dict=False)[0]
        return -torch.stack(v).squeeze(2)

    def vae_latents(self, x: Tensor) -> Tensor:
        return super().vae_latents(x.to(self.pipe.vae.dtype))
