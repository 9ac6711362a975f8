"""The fused ops in the transformers of diffusers: SD3, FLUX.1, FLUX.2 and Z-Image, in place and reversibly.

Reading order: fused.py (each step of a block, by its op or as diffusers runs it), sd3.py (the forwards of one
transformer, re-stated in those steps), layers.py, flux.py, flux2.py, zimage.py, fingerprints.py (which forwards of
diffusers these stand for), and `apply` here. diffusers and peft are imported by the first call of `apply`.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial

from torch import nn


def apply(transformer: nn.Module, ops: str | Iterable[str] = "all") -> "Handle":
    """Let the blocks of a diffusers transformer run the fused ops. Undo it by `undo()` of the handle that it returns.

    transformer: SD3Transformer2DModel, FluxTransformer2DModel, Flux2Transformer2DModel, ZImageTransformer2DModel, or a
    module that holds their blocks.
    ops: "all", or names of these; what is not named runs as diffusers runs it, bit for bit:
        lora          lora_linear for the LoRA layers of peft in the blocks, added before or after: those with one
                      active, unmerged adapter without dropout, variant (DoRA, ...), bias and hooks, in no
                      Sequential. peft runs the rest.
        modulation    modulated_layer_norm, modulated_rms_norm, gated_residual, gated_residual_layer_norm
        qk_norm       qk_norm, where the attention normalises queries and keys
        activations   gelu, swiglu
    Where no kernel of an op runs, such as on a CPU for which it is not compiled, PyTorch runs its formula as diffusers
    does, unless FLOWBP_KERNELS names a backend.

    No class is changed: each block, attention, feed-forward layer and adaptive norm gets an instance attribute
    `forward`. Values and gradients are those of diffusers to rounding. Names of parameters, state dicts, gradient
    checkpointing, FSDP2, autocast and selective_recompute work as before. So do hooks: a norm or an activation within a
    block that has some is called, without its op.
    Blocks that are compiled in place (block.compile(), compile_repeated_blocks), before or after, keep both: the graph
    of a block calls the kernels as operators, and the compiler fuses what lies between them.
    Another attention processor that is set later runs as diffusers runs it. A deep copy of the transformer keeps the
    ops and has no handle; so does one that torch.save wrote whole.
    Raises ValueError for an unknown name in ops; for a block, layer or attention processor that is not known, that has
    a forward of its own, or whose source in the installed diffusers is not the one re-stated here; and for a
    transformer to which the ops have been applied already.

        handle = flowbp_kernels.apply(pipe.transformer)
    """
    from flowbp_kernels.blocks import fingerprints, fused, table

    names = set(fused.FAMILIES) if ops == "all" else {ops} if isinstance(ops, str) else set(ops)
    if unknown := names - set(fused.FAMILIES):
        raise ValueError(f"unknown ops {sorted(unknown)}; there are {', '.join(fused.FAMILIES)}, or 'all'")
    found = table.replacements(transformer)
    functions = {*found.values(), fused.Fused.project} if "lora" in names else set(found.values())
    if stale := sorted({text for function in functions for text in fingerprints.changed(function)}):
        raise ValueError(
            f"{', '.join(stale)}: its source is not the one that flowbp_kernels re-states, so that results could "
            "differ. Install the version for which this flowbp was written, or do without flowbp_kernels.apply"
        )
    steps = fused.Fused(frozenset(names))
    for module, function in found.items():
        setattr(module, "flowbp_fused", steps)  # noqa: B010 (torch types attributes of a module as tensors)
        module.forward = partial(function, module)  # a bound method would not be read back from a pickle
    return Handle(transformer, list(found), names)


class Handle:
    """What `apply` replaced in a transformer. Its repr says what runs fused, and what does not and why, as of now."""

    def __init__(self, transformer: nn.Module, modules: list[nn.Module], ops: set[str]):
        self.transformer, self.ops, self._modules = transformer, sorted(ops), modules
        self._forwards = [module.forward for module in modules]

    def undo(self) -> None:
        """Give every module the forward of its class back. Raises ValueError, and changes nothing, where something else
        has replaced one since.
        """
        for module, forward in zip(self._modules, self._forwards, strict=True):
            if module.__dict__.get("forward") is not forward:
                raise ValueError(
                    f"the forward of {type(module).__name__} was replaced after flowbp_kernels.apply: undo that first"
                )
        for module in self._modules:
            del module.forward, module.flowbp_fused
        self._modules, self._forwards = [], []

    @property
    def replaced(self) -> dict[str, int]:
        """How many modules of each class run functions of this package."""
        from flowbp_kernels.blocks.table import known_class

        return dict(Counter(kind.__name__ for kind in map(known_class, self._modules) if kind))

    @property
    def left(self) -> list[str]:
        """What runs as diffusers and peft run it, and why."""
        from flowbp_kernels.blocks import fused, table

        device = next((p.device.type for p in self.transformer.parameters()), "cpu")
        left = [f"{name}: not named in ops" for name in fused.FAMILIES if name not in self.ops]
        left += [f"{name}: no kernel for {device}" for name in self.ops if not fused.pays(name, device)]
        if without := sum(getattr(module, "norm_q", module) is None for module in self._modules):
            left.append(f"qk_norm: {without} attentions do not normalise queries and keys")
        within = [*table.lora_layers(self._modules)]
        obstacles = Counter(map(fused.lora_obstacle, within))
        everywhere = sum(hasattr(module, "lora_A") for module in self.transformer.modules())
        obstacles["called by modules that are left"] = everywhere - len(within)
        return left + [f"{count} LoRA layers: {why}" for why, count in obstacles.items() if why and count]

    def __repr__(self) -> str:
        replaced = ", ".join(f"{count} {name}" for name, count in self.replaced.items())
        left = "; ".join(self.left)
        return f"<{type(self.transformer).__name__} runs fused: {replaced or 'nothing'}; left: {left or 'nothing'}>"
