"""The blocks of Z-Image by fused ops. Each function takes the place of a module's forward."""

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)

from flowbp_kernels.blocks.fingerprints import restates
from flowbp_kernels.blocks.flux import dispatched


@restates((ZImageTransformerBlock.forward, "c962ce9c5e9d"), (RMSNorm.forward, "d4b19ee941ec"))
def block(
    self,
    x,
    attn_mask,
    freqs_cis,
    adaln_input=None,
    noise_mask=None,
    adaln_noisy=None,
    adaln_clean=None,
):
    fused = self.flowbp_fused
    if not self.modulation:
        x = x + fused.rms_norm(self.attention_norm2, _attended(self, x, None, attn_mask, freqs_cis))
        return x + fused.rms_norm(self.ffn_norm2, self.feed_forward(fused.rms_norm(self.ffn_norm1, x)))
    if noise_mask is not None:  # rows by token, for which there is no op
        return type(self).forward(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    modulation = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
    scale_msa, gate_msa, scale_mlp, gate_mlp = modulation
    y = fused.rms_norm(self.attention_norm2, _attended(self, x, scale_msa, attn_mask, freqs_cis))
    x = fused.gated(x, gate_msa.tanh(), y)
    y = self.feed_forward(fused.rms_norm(self.ffn_norm1, x, scale_mlp))
    return fused.gated(x, gate_mlp.tanh(), fused.rms_norm(self.ffn_norm2, y))


def _attended(self, x, scale, attn_mask, freqs_cis):
    x = self.flowbp_fused.rms_norm(self.attention_norm1, x, scale)
    return self.attention(x, attention_mask=attn_mask, freqs_cis=freqs_cis)


@restates(
    (Attention.forward, "ae5d10616712"),
    (ZSingleStreamAttnProcessor.__call__, "4024556f43e2"),
    (apply_rotary_emb, "db7e06a94114"),
)
def attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None, **options):
    if type(self.processor) is not ZSingleStreamAttnProcessor or options:
        options["freqs_cis"] = freqs_cis
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    fused = self.flowbp_fused
    q, k, v = (
        fused.project(layer, hidden_states).unflatten(-1, (self.heads, -1))
        for layer in (self.to_q, self.to_k, self.to_v)
    )
    q, k = fused.queries_and_keys([q], [k], [self.norm_q], [self.norm_k], freqs_cis)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    y = fused.project(self.to_out[0], dispatched(self, q, k, v, attention_mask))
    return self.to_out[1](y) if len(self.to_out) > 1 else y


@restates((FeedForward.forward, "569d2d7af97b"), (FeedForward._forward_silu_gating, "940eb62ad4fc"))
def feed_forward(self, x):
    fused = self.flowbp_fused
    return fused.project(self.w2, fused.swiglu(fused.project(self.w1, x), fused.project(self.w3, x)))


BLOCKS = {ZImageTransformerBlock: block}
ATTENTIONS = {(Attention, ZSingleStreamAttnProcessor): attention}
LAYERS = {FeedForward: feed_forward}
