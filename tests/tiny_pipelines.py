"""Tiny pipelines with random weights, one for every backbone, built offline in under a second. They serve the tests,
benchmarks/train_step.py, and dry runs of a config:

    python tests/tiny_pipelines.py FluxPipeline tiny-flux         then  flowbp train ... backbone.name=tiny-flux

They have every part of the real ones (text encoders and tokenizers too) and draw noise-like images of any size in
multiples of 16 pixels. Random matrices are wide enough that every input of the network matters to its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["TINY_PIPELINES", "tiny_pipeline"]

WIDTH = 16  # of the text encoders
CHANNELS = 4  # of the VAE's latents

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif "
    "%}{% endif %}"
)


def tiny_pipeline(class_name: str, seed: int = 0, wider: int = 1) -> DiffusionPipeline:
    """A float32 pipeline of one of TINY_PIPELINES, its weights drawn from `seed`.

    wider: multiplies the heads of the transformer's attention, of which there are 2, and its width, 16 or 32.
    """
    if class_name not in TINY_PIPELINES:
        raise ValueError(f"no tiny {class_name}; there are {', '.join(TINY_PIPELINES)}")
    pipe = TINY_PIPELINES[class_name](wider)
    generator = torch.Generator().manual_seed(seed)
    for _, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            draw_weights(part, generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw_weights(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Matrices with standard deviation 1.2 / sqrt(fan in), small biases, and running statistics that are not those of a
    fresh module.
    """
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.normal_(0, 1.2 * (len(p) / p.numel()) ** 0.5, generator=generator)
        elif name.endswith("bias"):
            p.normal_(0, 0.1, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.5, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=generator)


# -- one function a class ----------------------------------------------------------------------------------------------


def sd3(wider: int) -> StableDiffusion3Pipeline:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=8,
        num_attention_heads=2 * wider, joint_attention_dim=2 * WIDTH, caption_projection_dim=16 * wider,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)), tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5_config(t5, 2 * WIDTH)), tokenizer_3=t5,
    )  # fmt: skip


def flux(wider: int) -> FluxPipeline:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2 * wider, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config(t5, WIDTH)), tokenizer_2=t5,
    )  # fmt: skip


def flux2(wider: int) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2 * wider,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=2,
        sample_size=64,
    )  # fmt: skip
    return Flux2KleinPipeline(
        # The pipeline reads layers 9, 18 and 27 of the text encoder.
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder, text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, layers=28)), tokenizer=tokenizer,
    )  # fmt: skip


def zimage(wider: int) -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=32 * wider, n_layers=2, n_refiner_layers=1, n_heads=2 * wider, n_kv_heads=2 * wider,
        cap_feat_dim=WIDTH, axes_dims=[4, 4, 8], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(), text_encoder=Qwen3Model(qwen_config(tokenizer, layers=2)), tokenizer=tokenizer,
    )  # fmt: skip


TINY_PIPELINES: dict[str, Callable[[int], DiffusionPipeline]] = {
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2,
    "ZImagePipeline": zimage,
}

# -- the parts ---------------------------------------------------------------------------------------------------------


def vae() -> AutoencoderKL:
    """The 8 x autoencoder of SD3 and FLUX.1, with FLUX.1's scale and shift."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=2,
        sample_size=64, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        force_upcast=False,
    )  # fmt: skip


def clip_tokenizer() -> CLIPTokenizer:
    """One token a byte."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=WIDTH, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    """One token a printable character."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, 0.0 if i < 3 else -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5_config(tokenizer: T5Tokenizer, width: int) -> T5Config:
    return T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_heads=2, num_layers=2)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and the marks of a chat."""
    vocab = {token: i for i, token in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    marks = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save a tiny pipeline with random weights.")
    parser.add_argument("pipeline", choices=TINY_PIPELINES)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    tiny_pipeline(arguments.pipeline).save_pretrained(arguments.folder)
