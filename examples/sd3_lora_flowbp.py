"""LoRA fine-tuning of a Stable Diffusion 3 transformer on latents of images, with flowbp_kernels.

The same losses as sd3_lora.py; the steps between the matrix products are fused, and the LoRA layers keep no float32
copy of their input.
"""

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

import flowbp_kernels

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def train(transformer, batches, rank=16, learning_rate=1e-4):
    """One optimizer step a batch of (latents, prompt embeddings, pooled prompt embeddings); returns the losses."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    cast_training_params(transformer, torch.float32)
    flowbp_kernels.apply(transformer)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    losses = []
    for latents, prompts, pooled in batches:
        noise = torch.randn_like(latents)
        sigmas = torch.sigmoid(torch.randn(len(latents), 1, 1, 1, device=latents.device))  # as SD3 was trained
        velocity = transformer(
            hidden_states=torch.lerp(latents, noise, sigmas.to(latents.dtype)),
            timestep=1000 * sigmas.flatten(),
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - latents)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)
