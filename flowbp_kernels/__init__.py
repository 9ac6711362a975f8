"""Fused low-level operations for training flow-matching models through a cached rollout. Needs torch, nothing else.

op                    formula                                            gradient to      kernels
quadrature_update     x + sum_k w_k v_{n_k}                              x, velocities    cuda, triton, cpu
leap_residuals        mean |x + sum_k w_k v_{n_k} - x'|, both leaps      nothing          cuda, triton, cpu
cfg_euler_step        v = v_u + s (v_c - v_u);  x + h v                  x, v_c, v_u      cuda, triton, cpu
cfg_multistep_step    that v;  x + sum_k w_k v_{n_k} + h v               x, v_c, v_u, v_n cuda, triton, cpu
bridge_cotangents     c_k = w_k (g + a_k g_x)                            g, g_x           cuda, triton, cpu
straight_through      value of one tensor, scaled gradient of another    surrogate        PyTorch's copy
selective_recompute   cached value; backward replays the active nodes    parameters       bridge_cotangents

Between the matrix products of a network, where a pass moves most of its bytes:

op                         formula                                       gradient to      kernels
modulated_layer_norm       LN(x) (1 + scale) + shift, once or twice      all tensors      triton, cpu
modulated_rms_norm         weight x / rms(x) (1 + scale)                 all tensors      triton, cpu
gated_residual             residual + gate y                             all tensors      triton, cpu
gated_residual_layer_norm  s = residual + gate y;  s, modulated LN(s)    all tensors      triton, cpu
qk_norm                    R (w x / rms(x)) of all streams, joined       queries, keys, w triton, cpu
swiglu                     silu(gate) value, behind a prefix             gate, value      triton, cpu
gelu                       tanh-approximate GELU, behind a prefix        x                triton, cpu
lora_linear                x W^T + bias + scale (x a^T) b^T              all tensors      PyTorch's GEMMs
apply                      all of these in the blocks of diffusers' SD3, FLUX.1, FLUX.2 and Z-Image

Around a network:

offload_blocks             frozen weights of blocks live in CPU memory and visit the device, in backward too
set_attention              the attention kernel of a diffusers transformer: PyTorch's, cuDNN's first, or another
GraphedForward             a forward pass without gradient as a CUDA graph
in_tf32                    a function whose float32 matrix products take TF32, in forward and backward and nowhere else

Every op has a reference in plain PyTorch, which runs on any device and in any dtype; the kernels take float32, bfloat16
and float16, and a float8_e4m3fn cache. Sums accumulate in float32 (float64 where a tensor is float64) and are rounded
once. A zero weight skips its term, so that 0 * NaN does not poison a sum. Each function's docstring is its contract,
with the equivalent PyTorch. Input outside the contract raises ValueError.

The nodes, weights, guidance and step of a call are its rule. A rule of numbers or CPU tensors travels by value, as part
of a launch. A rule of tensors on the device is read when the kernel runs, so that one captured CUDA graph serves every
plan. Both give the same bits.

FLOWBP_KERNELS=auto | cuda | triton | cpu | reference chooses the backend; `python -m flowbp_kernels` prints what runs
here, and why. Without the compiled extension (FLOWBP_BUILD=0 at installation) and Triton, the reference runs.

Reading order: reference.py and network_reference.py (every formula on two pages), quadrature_update.py (an op),
operators.py (how it is registered), csrc/ops.h and csrc/cpu/ (its kernel), backend.py (which one runs), sweep.py,
recompute.py (its autograd function), blocks/ (the ops in a transformer), offload.py (its weights).
"""

from flowbp_kernels import adjoints  # noqa: F401  (registers gradients)
from flowbp_kernels.activations import gelu, swiglu
from flowbp_kernels.attention import set_attention
from flowbp_kernels.blocks import apply
from flowbp_kernels.bridge_cotangents import bridge_cotangents
from flowbp_kernels.cfg_euler_step import cfg_euler_step
from flowbp_kernels.cfg_multistep_step import cfg_multistep_step
from flowbp_kernels.graphed import GraphedForward
from flowbp_kernels.leap_residuals import leap_residuals
from flowbp_kernels.lora_linear import lora_linear
from flowbp_kernels.modulation import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from flowbp_kernels.offload import offload_blocks
from flowbp_kernels.qk_norm import qk_norm
from flowbp_kernels.quadrature_update import quadrature_update
from flowbp_kernels.recompute import selective_recompute
from flowbp_kernels.straight_through import straight_through
from flowbp_kernels.sweep import RngState
from flowbp_kernels.tf32 import in_tf32

__all__ = [
    "GraphedForward",
    "RngState",
    "apply",
    "bridge_cotangents",
    "cfg_euler_step",
    "cfg_multistep_step",
    "gated_residual",
    "gated_residual_layer_norm",
    "gelu",
    "in_tf32",
    "leap_residuals",
    "lora_linear",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "offload_blocks",
    "qk_norm",
    "quadrature_update",
    "selective_recompute",
    "set_attention",
    "straight_through",
    "swiglu",
]
