"""The layers that SD3, FLUX.1 and others of diffusers share, by fused ops: adaptive norms and feed-forward layers.

Each function takes the place of a module's forward, and its arguments are those of the forward.
"""

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)

from flowbp_kernels.blocks.fingerprints import restates


@restates((AdaLayerNormZero.forward, "a60f5bfb23bb"))
def ada_layer_norm_zero(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    fused = self.flowbp_fused
    shift, scale, *rest = fused.project(self.linear, self.silu(emb)).chunk(6, dim=1)
    return fused.layer_norm(self.norm, x, shift, scale), *rest


@restates((AdaLayerNormZeroSingle.forward, "8cd213fab66b"))
def ada_layer_norm_zero_single(self, x, emb=None):
    fused = self.flowbp_fused
    shift, scale, gate = fused.project(self.linear, self.silu(emb)).chunk(3, dim=1)
    return fused.layer_norm(self.norm, x, shift, scale), gate


@restates((SD35AdaLayerNormZeroX.forward, "21af2397e181"))
def ada_layer_norm_zero_x(self, hidden_states, emb=None):
    fused = self.flowbp_fused
    modulation = fused.project(self.linear, self.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift_2, scale_2, gate_2 = modulation
    x, x_2 = fused.two_layer_norms(self.norm, hidden_states, shift, scale, shift_2, scale_2)
    return x, gate, shift_mlp, scale_mlp, gate_mlp, x_2, gate_2


@restates((AdaLayerNormContinuous.forward, "e0a05ec5346a"))
def ada_layer_norm_continuous(self, x, conditioning_embedding):
    fused = self.flowbp_fused
    scale, shift = fused.project(self.linear, self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return fused.layer_norm(self.norm, x, shift, scale)


@restates((GELU.forward, "b19a404e9b86"), (GELU.gelu, "2c07338b994d"))
def projected_gelu(self, hidden_states):
    fused = self.flowbp_fused
    return fused.gelu(self, fused.project(self.proj, hidden_states))


@restates((FeedForward.forward, "d6a8ac3357c7"))
def feed_forward(self, hidden_states, *args, **kwargs):
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)  # where diffusers says that they are deprecated
    for module in self.net:
        hidden_states = self.flowbp_fused.project(module, hidden_states)
    return hidden_states


LAYERS = {
    AdaLayerNormZero: ada_layer_norm_zero,
    AdaLayerNormZeroSingle: ada_layer_norm_zero_single,
    SD35AdaLayerNormZeroX: ada_layer_norm_zero_x,
    AdaLayerNormContinuous: ada_layer_norm_continuous,
    GELU: projected_gelu,
    FeedForward: feed_forward,
}
