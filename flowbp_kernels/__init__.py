"""Fused low-level operations for training flow-matching models through a cached rollout. Needs torch, nothing else.

op                                 formula                                            gradient to       kernels
quadrature_update                  x + sum_k w_k v_{n_k}                              x, velocities     cpu, reference
cfg_euler_step                     v = v_u + s (v_c - v_u);  x + h v                  x, v_c, v_u       reference
bridge_cotangents                  c_k = w_k (g + a_k g_x)                            g, g_x            reference
straight_through                   value of one tensor, scaled gradient of another    surrogate         reference
leap_residuals                     mean |prediction - reference|, one a sample        both              reference
selective_recompute                cached value; backward replays the active nodes    parameters        PyTorch autograd

Sums accumulate in float32 (float64 where a tensor is float64) and are rounded once. A zero weight skips: it does not
poison a sum with 0 * NaN. Weights travel by value: numbers or CPU tensors, in sigma units.
Each function's docstring is its contract, with the equivalent PyTorch. Input outside it raises ValueError.

FLOWBP_KERNELS=auto | cpu | reference chooses the backend; `python -m flowbp_kernels` prints what runs here, and why.
Without the compiled extension (FLOWBP_BUILD=0 at installation) every op runs on its reference.

Reading order: reference.py (every formula on one page), quadrature_update.py and csrc/ (an op with a compiled kernel),
backend.py (which one runs), recompute.py.
"""

from flowbp_kernels.quadrature_update import quadrature_update
from flowbp_kernels.recompute import RngState, selective_recompute
from flowbp_kernels.reference import bridge_cotangents, cfg_euler_step, leap_residuals, straight_through

__all__ = [
    "RngState",
    "bridge_cotangents",
    "cfg_euler_step",
    "leap_residuals",
    "quadrature_update",
    "selective_recompute",
    "straight_through",
]
