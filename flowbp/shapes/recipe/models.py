"""The parts of the `shapes` model: diffusers' and transformers' own classes at small sizes, and how the flow is
conditioned.

Sizes (parameters): VAE .18 M, transformer 2.3 M, text encoder .4 M and a tiny second one, reward .6 M, monitor .35 M.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ..world import HUES, NUMBERS, SHAPES, SIZE

PLURALS = ("circles", "squares", "triangles", "crosses")
WORDS = ("a", "and", "left", "right", "of", "above", "below", *NUMBERS, *HUES, *SHAPES, *PLURALS)

MAX_TOKENS = 12
TEXT_WIDTH, TEXT_WIDTH_2 = 128, 32  # of the pipeline's two text encoders; both hidden and pooled
LATENT = (8, 8, 8)  # channels, height, width


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the world is one token; other words fall apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}  # not 2: CLIP takes an eos id of 2 for that of an old checkpoint
    merges = []
    for word in sorted(WORDS, key=len, reverse=True):  # long words first: no merge of a short one may break them
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if tuple(pieces[:2]) not in merges:
                merges.append(tuple(pieces[:2]))
            pieces[:2] = [pieces[0] + pieces[1]]
    for token in [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]:
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [B, 12], padded with the end token, as the pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def _tower(width: int, layers: int) -> dict:
    """The sizes of an encoder, of text or of images."""
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width,
        num_attention_heads=max(1, width // 32), hidden_act="gelu",
    )  # fmt: skip


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> dict:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _tower(width, layers) | ends | dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS)


def build_vae() -> AutoencoderKL:
    """8 latent channels at a quarter of the resolution: 3 x 32 x 32 -> 8 x 8 x 8. SD3's scaling is the identity."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
        block_out_channels=(16, 16, 32), latent_channels=LATENT[0], norm_num_groups=4, sample_size=SIZE,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0, force_upcast=False,
    )  # fmt: skip


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Make each latent channel have mean 0 and deviation 1, by a change of the VAE's 1 x 1 convolutions in place.

    The present mean and deviation are measured on `latents` [N, 8, 8, 8]. Reconstructions stay as they are.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    c = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()  # the log-variances
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


class Flow(nn.Module):
    """What the flow stage trains: both text encoders and the transformer, called as StableDiffusion3Pipeline calls
    them.

    Without a T5 the pipeline appends `max_sequence_length` (default 256) zero tokens to the text. They stay equal to
    one another in every layer. Training therefore feeds one of them and adds log n to its attention logits, which is
    the same as n of them. n is drawn from 1 to 256, so the model works with any; pass max_sequence_length=1 where speed
    matters.
    """

    def __init__(self, tokenizer: CLIPTokenizer, width: int = 128, layers: int = 4):
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(tokenizer, TEXT_WIDTH, 2)))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(tokenizer, TEXT_WIDTH_2, 2)))
        joint = TEXT_WIDTH + TEXT_WIDTH_2
        self.transformer = SD3Transformer2DModel(
            sample_size=LATENT[1], patch_size=2, in_channels=LATENT[0], out_channels=LATENT[0], num_layers=layers,
            attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=joint, qk_norm="rms_norm",
            caption_projection_dim=width, pooled_projection_dim=joint, pos_embed_max_size=LATENT[1] // 2,
        )  # fmt: skip
        self.transformer.set_attn_processor(BiasedJointAttention())
        modulations = [norm.linear for b in self.transformer.transformer_blocks for norm in (b.norm1, b.norm1_context)]
        for linear in (*modulations, self.transformer.norm_out.linear, self.transformer.proj_out):  # adaLN-zero
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def encode(self, ids: torch.Tensor, zeros: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, 12] -> tokens [B, 12 + zeros, 160], pooled [B, 160], as pipe.encode_prompt(max_sequence_length=zeros)
        gives them.
        """
        outs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        return F.pad(tokens, (0, 0, 0, zeros)), torch.cat([out.text_embeds for out in outs], dim=-1)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, zeros: float = 1.0) -> torch.Tensor:
        """Velocity [B, 8, 8, 8] of x at noise level sigma [B] for token ids [B, 12], with `zeros` zero tokens after the
        text.
        """
        tokens, pooled = self.encode(ids)
        key_bias = x.new_zeros(LATENT[1] * LATENT[2] // 4 + tokens.shape[1])
        key_bias[-1] = math.log(zeros)
        for block in self.transformer.transformer_blocks:
            block.attn.processor.key_bias = key_bias
        return self.transformer(x, tokens, pooled, sigma * 1000, return_dict=False)[0]


class BiasedJointAttention:
    """SD3's joint attention with a bias [keys] added to the logits; keys are image tokens, then text tokens."""

    key_bias: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        def heads(projection, norm, x):
            x = projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q, attn.norm_q, image), heads(attn.add_q_proj, attn.norm_added_q, text)], dim=2)
        k = torch.cat([heads(attn.to_k, attn.norm_k, image), heads(attn.add_k_proj, attn.norm_added_k, text)], dim=2)
        v = torch.cat([heads(attn.to_v, None, image), heads(attn.add_v_proj, None, text)], dim=2)
        mask = self.key_bias.expand(q.shape[0], 1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        image, text = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](image), (text if attn.context_pre_only else attn.to_add_out(text))


def build_scorer(tokenizer: CLIPTokenizer, width: int, patch: int, image_layers: int, text_layers: int) -> CLIPModel:
    """A CLIP of images [B, 3, 32, 32] and captions, embeddings of `width` numbers."""
    vision = _tower(width, image_layers) | dict(image_size=SIZE, patch_size=patch)
    text, options = _text_config(tokenizer, width, text_layers), dict(projection_dim=width, logit_scale_init_value=3.0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **options))


def build_image_processor() -> CLIPImageProcessor:
    """What a scorer expects of its images: 32 x 32 pixels in [-1, 1]."""
    size, crop = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size=size, crop_size=crop, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def score(model: CLIPModel, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [B] of each image and its caption. images: [B, 3, 32, 32] in [-1, 1]; ids: [B, 12]."""
    image = model.get_image_features(pixel_values=images).pooler_output
    text = model.get_text_features(input_ids=ids).pooler_output
    return F.cosine_similarity(image, text, dim=-1)
