"""The blocks of SD3 and SD3.5 by fused ops. Each function takes the place of a module's forward."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock, _chunked_feed_forward
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm

from flowbp_kernels.blocks.fingerprints import restates


@restates((JointTransformerBlock.forward, "25097c42ae6c"))
def joint_block(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    fused, options = self.flowbp_fused, joint_attention_kwargs or {}
    x, context = hidden_states, encoder_hidden_states
    x_normed, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(x, emb=temb)
    if self.context_pre_only:
        context_normed, of_context = self.norm1_context(context, temb), []
    else:
        context_normed, *of_context = self.norm1_context(context, emb=temb)
    y, context_y = self.attn(hidden_states=x_normed, encoder_hidden_states=context_normed, **options)
    if self.use_dual_attention:
        x = fused.gated(x, gate, y)
        x_normed, gate = second
        y = self.attn2(hidden_states=x_normed, **options)
    x, x_normed = fused.gated_layer_norm(x, gate, y, self.norm2, shift_mlp, scale_mlp)
    x = fused.gated(x, gate_mlp, _fed_forward(self, self.ff, x_normed))
    if self.context_pre_only:
        return None, x
    gate, shift_mlp, scale_mlp, gate_mlp = of_context
    context, normed = fused.gated_layer_norm(context, gate, context_y, self.norm2_context, shift_mlp, scale_mlp)
    return fused.gated(context, gate_mlp, _fed_forward(self, self.ff_context, normed)), x


def _fed_forward(block, layer, x):
    if block._chunk_size is None:
        return layer(x)
    return _chunked_feed_forward(layer, x, block._chunk_dim, block._chunk_size)


@restates(
    (Attention.forward, "ae5d10616712"),
    (JointAttnProcessor2_0.__call__, "9f0739d4e990"),
    (RMSNorm.forward, "d4b19ee941ec"),
)
def joint_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
    if type(self.processor) is not JointAttnProcessor2_0 or options:
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    fused, length = self.flowbp_fused, hidden_states.shape[1]
    layers, norms = [(self.to_q, self.to_k, self.to_v)], [(self.norm_q, self.norm_k)]
    streams = [hidden_states]
    if encoder_hidden_states is not None:
        layers.append((self.add_q_proj, self.add_k_proj, self.add_v_proj))
        norms.append((self.norm_added_q, self.norm_added_k))
        streams.append(encoder_hidden_states)
    projections = [
        [fused.project(layer, x).unflatten(-1, (self.heads, -1)) for layer in of_stream]
        for of_stream, x in zip(layers, streams, strict=True)
    ]
    queries, keys, values = zip(*projections, strict=True)
    q, k = fused.queries_and_keys(queries, keys, *zip(*norms, strict=True))
    v = values[0] if len(values) == 1 else torch.cat(values, dim=1)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    y = y.transpose(1, 2).flatten(2).to(q.dtype)
    if encoder_hidden_states is None:
        return self.to_out[1](fused.project(self.to_out[0], y))
    y, context_y = y[:, :length], y[:, length:]
    if not self.context_pre_only:
        context_y = fused.project(self.to_add_out, context_y)
    return self.to_out[1](fused.project(self.to_out[0], y)), context_y


BLOCKS = {JointTransformerBlock: joint_block}
ATTENTIONS = {(Attention, JointAttnProcessor2_0): joint_attention}
