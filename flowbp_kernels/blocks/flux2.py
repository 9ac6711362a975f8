"""The blocks of FLUX.2 by fused ops. Each function takes the place of a module's forward."""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
    _get_fused_projections,
    _get_projections,
    _get_qkv_projections,
)

from flowbp_kernels.blocks.fingerprints import restates
from flowbp_kernels.blocks.flux import attended, dispatched, finite
from flowbp_kernels.blocks.fused import bare


@restates((Flux2TransformerBlock.forward, "b5faadf6e2d9"))
def double_block(
    self,
    hidden_states,
    encoder_hidden_states,
    temb_mod_img,
    temb_mod_txt,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
):
    fused, options = self.flowbp_fused, joint_attention_kwargs or {}
    x, context = hidden_states, encoder_hidden_states
    (shift, scale, gate), (shift_mlp, scale_mlp, gate_mlp) = Flux2Modulation.split(temb_mod_img, 2)
    (c_shift, c_scale, c_gate), (c_shift_mlp, c_scale_mlp, c_gate_mlp) = Flux2Modulation.split(temb_mod_txt, 2)
    y, context_y = self.attn(
        hidden_states=fused.layer_norm(self.norm1, x, shift, scale),
        encoder_hidden_states=fused.layer_norm(self.norm1_context, context, c_shift, c_scale),
        image_rotary_emb=image_rotary_emb,
        **options,
    )
    x, normed = fused.gated_layer_norm(x, gate, y, self.norm2, shift_mlp, scale_mlp)
    x = fused.gated(x, gate_mlp, self.ff(normed))
    context, normed = fused.gated_layer_norm(context, c_gate, context_y, self.norm2_context, c_shift_mlp, c_scale_mlp)
    return finite(fused.gated(context, c_gate_mlp, self.ff_context(normed))), x


@restates((Flux2SingleTransformerBlock.forward, "91246a63d442"))
def single_block(
    self,
    hidden_states,
    encoder_hidden_states,
    temb_mod,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
    split_hidden_states=False,
    text_seq_len=None,
):
    fused, x, length = self.flowbp_fused, hidden_states, text_seq_len
    if encoder_hidden_states is not None:
        length = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    ((shift, scale, gate),) = Flux2Modulation.split(temb_mod, 1)
    normed = fused.layer_norm(self.norm, x, shift, scale)
    y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = finite(fused.gated(x, gate, y))
    return (x[:, :length], x[:, length:]) if split_hidden_states else x


@restates(
    (Flux2Attention.forward, "8d28bea02251"),
    (Flux2AttnProcessor.__call__, "afc43043a30d"),
    (_get_qkv_projections, "ac200a74a1d5"),
    (_get_projections, "31a79e05803f"),
    (_get_fused_projections, "2cc0720de47e"),
    (apply_rotary_emb, "db7e06a94114"),
)
def attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **options):
    if type(self.processor) is not Flux2AttnProcessor or options:
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **options
        )
    fused, y = self.flowbp_fused, attended(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    if encoder_hidden_states is None:
        return self.to_out[1](fused.project(self.to_out[0], y))
    length = encoder_hidden_states.shape[1]
    context_y = fused.project(self.to_add_out, y[:, :length])
    return self.to_out[1](fused.project(self.to_out[0], y[:, length:])), context_y


@restates(
    (Flux2ParallelSelfAttention.forward, "7e99c2faa2b0"),
    (Flux2ParallelSelfAttnProcessor.__call__, "4c2023f59ce2"),
)
def parallel_attention(self, hidden_states, attention_mask=None, image_rotary_emb=None, **options):
    if type(self.processor) is not Flux2ParallelSelfAttnProcessor or options:
        return type(self).forward(self, hidden_states, attention_mask, image_rotary_emb, **options)
    fused, projected = self.flowbp_fused, self.flowbp_fused.project(self.to_qkv_mlp_proj, hidden_states)
    # By the ratio of the whole, because a tensor-parallel rank has its share of both.
    whole, of_mlp = projected.shape[-1], self.mlp_hidden_dim * self.mlp_mult_factor
    of_qkv = whole * 3 * self.inner_dim // (3 * self.inner_dim + of_mlp)
    qkv, mlp = projected.split([of_qkv, whole - of_qkv], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.chunk(3, dim=-1))
    q, k = fused.queries_and_keys([q], [k], [self.norm_q], [self.norm_k], image_rotary_emb)
    y = dispatched(self, q, k, v, attention_mask)
    act = self.mlp_act_fn
    joined = fused.swiglu(*mlp.chunk(2, dim=-1), y) if bare(act) else torch.cat([y, act(mlp)], dim=-1)
    return fused.project(self.to_out, joined)


@restates((Flux2FeedForward.forward, "b49b4a93ec1f"), (Flux2SwiGLU.forward, "9e314498fdea"))
def feed_forward(self, x):
    fused = self.flowbp_fused
    x = fused.project(self.linear_in, x)
    x = fused.swiglu(*x.chunk(2, dim=-1)) if bare(self.act_fn) else self.act_fn(x)
    return fused.project(self.linear_out, x)


BLOCKS = {Flux2TransformerBlock: double_block, Flux2SingleTransformerBlock: single_block}
ATTENTIONS = {
    (Flux2Attention, Flux2AttnProcessor): attention,
    (Flux2ParallelSelfAttention, Flux2ParallelSelfAttnProcessor): parallel_attention,
}
LAYERS = {Flux2FeedForward: feed_forward}
