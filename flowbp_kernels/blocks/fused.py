"""What the blocks of a transformer are made of: each step by its fused op, or as diffusers and peft compute it.

One `Fused` object serves all blocks of a transformer. Which of the two a step takes is decided when it is called: by
the family of the op, the device of the tensors, and the modules at hand. A module with hooks is called, so that they
run.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from flowbp_kernels import backend
from flowbp_kernels.activations import gelu, swiglu
from flowbp_kernels.blocks.fingerprints import restates
from flowbp_kernels.lora_linear import lora_linear
from flowbp_kernels.modulation import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from flowbp_kernels.qk_norm import Rope, qk_norm

FAMILIES = {  # and the kernels of each, by their names in csrc/; lora_linear is PyTorch's own GEMMs
    "lora": (),
    "modulation": ("modulation",),
    "qk_norm": ("qk_norm",),
    "activations": ("activations",),
}

LoraLinear = None
if find_spec("peft"):
    from peft.tuners.lora.layer import Linear as LoraLinear


@torch.compiler.assume_constant_result
def pays(family: str, device_type: str) -> bool:
    """Whether the ops of `family` run fused on a device: a kernel of each does, or FLOWBP_KERNELS names what does.
    Elsewhere the references would run, which are slower than PyTorch's own ops in the forward of diffusers.
    """
    if device_type == "meta" or backend.requested() != "auto":
        return True
    return all(_has_kernel(op, device_type) for op in FAMILIES[family])


@functools.cache
def _has_kernel(op: str, device_type: str) -> bool:
    if device_type == "cuda":
        return not backend.unavailable("triton")
    return device_type == "cpu" and not backend.unavailable("cpu") and hasattr(torch.ops.flowbp_compiled, op)


def bare(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else: no hook, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def lora_obstacle(layer: nn.Module) -> str:
    """Why peft runs a LoRA layer; "" for one that lora_linear takes, if its matrices are ordinary tensors."""
    if LoraLinear is None or type(layer).forward is not LoraLinear.forward:
        return f"{type(layer).__name__} has a forward of its own"
    assert isinstance(layer, LoraLinear)
    if not bare(layer):
        return "hooks"
    if layer.disable_adapters or layer.merged:
        return "adapters merged or disabled"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    (name,) = names
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__
    if type(layer.lora_dropout[name]) is not nn.Identity:
        return "dropout"
    for thin in (layer.lora_A[name], layer.lora_B[name]):
        if type(thin) is not nn.Linear or not bare(thin):
            return f"lora_A or lora_B is a {type(thin).__name__}, or has hooks"
        if thin.bias is not None:
            return "lora_bias"
    return ""


def _ordinary(*parameters: Tensor) -> bool:
    """Neither sharded nor quantised. FSDP2 gives a block ordinary parameters while it runs."""
    return all(type(parameter) is nn.Parameter for parameter in parameters)


def _plain_layer_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is None and len(norm.normalized_shape) == 1 and bare(norm)


def _plain_rms_norm(norm: Any) -> bool:
    known = type(norm) is RMSNorm and norm.bias is None or type(norm) is nn.RMSNorm and norm.eps is not None
    return known and bare(norm)


def _by_sample(*rows: Tensor | None) -> bool:
    """Whether each is one row a sample, or one for all; FLUX.2 has rows by token where it keeps keys and values."""
    return all(row is None or row.dim() == 2 or row.shape[1] == 1 for row in rows)


def _over_tokens(row: Tensor) -> Tensor:
    """[B, D] or [B, 1, D] as [B, 1, D]."""
    return row[:, None] if row.dim() == 2 else row


@dataclass(frozen=True)
class Fused:
    """The steps of a block. families: those of FAMILIES whose ops may run.

    Modules are Any here: what is read of them depends on their class.
    """

    families: frozenset[str]

    def runs(self, family: str, x: Tensor) -> bool:
        return family in self.families and pays(family, x.device.type)

    @restates(*([(LoraLinear.forward, "47b3154518f5")] if LoraLinear else []))
    def project(self, layer: Any, x: Tensor) -> Tensor:
        """layer(x), a LoRA layer of peft by lora_linear where it can be."""
        if type(layer) is nn.Linear or not hasattr(layer, "lora_A") or not self.runs("lora", x) or lora_obstacle(layer):
            return layer(x)
        (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
        a, b, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
        if not _ordinary(a, b):
            return layer(x)
        if type(base) is nn.Linear and bare(base) and _ordinary(base.weight):
            return lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])
        return lora_linear(x, base, None, a, b, layer.scaling[name])

    def layer_norm(self, norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift"""
        if self.runs("modulation", x) and _plain_layer_norm(norm) and _by_sample(shift, scale):
            return cast(Tensor, modulated_layer_norm(x, shift, scale, eps=norm.eps))
        return norm(x) * (1 + _over_tokens(scale)) + _over_tokens(shift)

    def two_layer_norms(
        self, norm: Any, x: Tensor, shift: Tensor, scale: Tensor, shift_2: Tensor, scale_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both modulations of norm(x)."""
        if self.runs("modulation", x) and _plain_layer_norm(norm):
            return cast(tuple, modulated_layer_norm(x, shift, scale, shift_2, scale_2, eps=norm.eps))
        x = norm(x)
        return x * (1 + scale[:, None]) + shift[:, None], x * (1 + scale_2[:, None]) + shift_2[:, None]

    def rms_norm(self, norm: Any, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """norm(x) * (1 + scale)"""
        if self.runs("modulation", x) and _plain_rms_norm(norm):
            return modulated_rms_norm(x, norm.weight, scale, eps=norm.eps)
        x = norm(x)
        return x if scale is None else x * (1.0 + scale)

    def gated(self, residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """residual + gate * y"""
        if self.runs("modulation", y) and _by_sample(gate):
            return gated_residual(residual, gate, y)
        return residual + _over_tokens(gate) * y

    def gated_layer_norm(
        self, residual: Tensor, gate: Tensor, y: Tensor, norm: Any, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """s = residual + gate * y and norm(s) * (1 + scale) + shift"""
        if self.runs("modulation", y) and _plain_layer_norm(norm) and _by_sample(gate, shift, scale):
            return gated_residual_layer_norm(residual, gate, y, shift, scale, eps=norm.eps)
        total = self.gated(residual, gate, y)
        return total, self.layer_norm(norm, total, shift, scale)

    def queries_and_keys(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        norms_q: Sequence[Any],
        norms_k: Sequence[Any],
        rope: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each stream [B, T, H, d] normalised, all joined along T, and rotated."""
        norms = *norms_q, *norms_k
        if self.runs("qk_norm", queries[0]) and all(map(_plain_rms_norm, norms)) and len({n.eps for n in norms}) == 1:
            weights_q, weights_k = [norm.weight for norm in norms_q], [norm.weight for norm in norms_k]
            return qk_norm(queries, keys, weights_q, weights_k, rope, eps=norms[0].eps)
        q, k = _joined(queries, norms_q), _joined(keys, norms_k)
        return (q, k) if rope is None else (_rotated(q, rope), _rotated(k, rope))

    def gelu(self, module: Any, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """F.gelu(x), in the approximation that `module` names, behind the prefix."""
        if self.runs("activations", x) and module.approximate == "tanh":
            return gelu(x, prefix=prefix)
        return _behind(prefix, F.gelu(x, approximate=module.approximate))

    def swiglu(self, gate: Tensor, value: Tensor, prefix: Tensor | None = None) -> Tensor:
        """silu(gate) * value, behind the prefix."""
        if self.runs("activations", gate):
            return swiglu(gate, value, prefix=prefix)
        return _behind(prefix, F.silu(gate) * value)


def _joined(streams: Sequence[Tensor], norms: Sequence[Any]) -> Tensor:
    streams = [x if norm is None else norm(x) for x, norm in zip(streams, norms, strict=True)]
    return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)


def _rotated(x: Tensor, rope: Any) -> Any:
    of_pairs = isinstance(rope, Tensor)  # cos + i sin
    return apply_rotary_emb(x, rope, use_real=not of_pairs, sequence_dim=1)


def _behind(prefix: Tensor | None, x: Tensor) -> Tensor:
    return x if prefix is None else torch.cat([prefix, x], dim=-1)
