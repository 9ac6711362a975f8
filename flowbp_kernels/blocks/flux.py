"""The blocks of FLUX.1 by fused ops. Each function takes the place of a module's forward."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    _get_fused_projections,
    _get_projections,
    _get_qkv_projections,
)

from flowbp_kernels.blocks.fingerprints import restates
from flowbp_kernels.blocks.fused import bare


@restates((FluxTransformerBlock.forward, "810f94d690f6"))
def double_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    fused, options = self.flowbp_fused, joint_attention_kwargs or {}
    x, context = hidden_states, encoder_hidden_states
    x_normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
    context_normed, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(context, emb=temb)
    y, context_y, *of_images = self.attn(
        hidden_states=x_normed, encoder_hidden_states=context_normed, image_rotary_emb=image_rotary_emb, **options
    )
    x, x_normed = fused.gated_layer_norm(x, gate, y, self.norm2, shift_mlp, scale_mlp)
    x = fused.gated(x, gate_mlp, self.ff(x_normed))
    for y in of_images:  # of an IP-adapter, if its processor was set after `apply`
        x = x + y
    context, normed = fused.gated_layer_norm(context, c_gate, context_y, self.norm2_context, c_shift_mlp, c_scale_mlp)
    return finite(fused.gated(context, c_gate_mlp, self.ff_context(normed))), x


@restates((FluxSingleTransformerBlock.forward, "f4bfea834af2"))
def single_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    fused, length = self.flowbp_fused, encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(x, emb=temb)
    mlp = fused.project(self.proj_mlp, normed)
    y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    joined = fused.gelu(self.act_mlp, mlp, y) if bare(self.act_mlp) else torch.cat([y, self.act_mlp(mlp)], dim=2)
    x = finite(fused.gated(x, gate, fused.project(self.proj_out, joined)))
    return x[:, :length], x[:, length:]


def finite(x):
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


@restates(
    (FluxAttention.forward, "88d38617a78c"),
    (FluxAttnProcessor.__call__, "4190a6a5f24d"),
    (_get_qkv_projections, "449b759b8d98"),
    (_get_projections, "fd3c9c36bbb8"),
    (_get_fused_projections, "d0c4b4e7c4ed"),
    (apply_rotary_emb, "db7e06a94114"),
)
def attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **options):
    if type(self.processor) is not FluxAttnProcessor or options:
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **options
        )
    fused, y = self.flowbp_fused, attended(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    if encoder_hidden_states is None:
        return y
    length = encoder_hidden_states.shape[1]
    context_y, y = y[:, :length].contiguous(), y[:, length:].contiguous()
    return self.to_out[1](fused.project(self.to_out[0], y)), fused.project(self.to_add_out, context_y)


def attended(self, x, context, mask, rope):
    """The attention of the context's tokens and x's, joined in this order, before the output projections: [B, T, D]"""
    fused = self.flowbp_fused
    norms, layers = [(self.norm_q, self.norm_k)], [(self.to_q, self.to_k, self.to_v)]
    joint = [self.to_qkv] if self.fused_projections else []
    streams = [x]
    if self.added_kv_proj_dim is not None:
        norms.insert(0, (self.norm_added_q, self.norm_added_k))
        layers.insert(0, (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        joint = [self.to_added_qkv, *joint] if self.fused_projections else []
        streams.insert(0, context)
    if self.fused_projections:
        projected = [fused.project(layer, s).chunk(3, dim=-1) for layer, s in zip(joint, streams, strict=True)]
    else:
        projected = [
            [fused.project(layer, s) for layer in of_stream] for of_stream, s in zip(layers, streams, strict=True)
        ]
    by_head = [[x.unflatten(-1, (-1, self.head_dim)) for x in of_stream] for of_stream in projected]
    queries, keys, values = zip(*by_head, strict=True)
    q, k = fused.queries_and_keys(queries, keys, *zip(*norms, strict=True), rope)
    return dispatched(self, q, k, values[0] if len(values) == 1 else torch.cat(values, dim=1), mask)


def dispatched(self, q, k, v, mask):
    """diffusers' choice of an attention kernel, on [B, T, H, d]; returns [B, T, D]."""
    processor = self.processor
    backend, parallel = processor._attention_backend, processor._parallel_config
    y = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)
    return y.flatten(2, 3).to(q.dtype)


BLOCKS = {FluxTransformerBlock: double_block, FluxSingleTransformerBlock: single_block}
ATTENTIONS = {(FluxAttention, FluxAttnProcessor): attention}
