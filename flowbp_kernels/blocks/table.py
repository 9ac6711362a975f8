"""Which function takes the place of which forward."""

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from flowbp_kernels.blocks import flux, flux2, layers, sd3, zimage

BLOCKS = sd3.BLOCKS | flux.BLOCKS | flux2.BLOCKS | zimage.BLOCKS
LAYERS = layers.LAYERS | flux2.LAYERS | zimage.LAYERS
ATTENTIONS = sd3.ATTENTIONS | flux.ATTENTIONS | flux2.ATTENTIONS | zimage.ATTENTIONS  # by attention and its processor
CLASSES = {*BLOCKS, *LAYERS, *(attention for attention, _ in ATTENTIONS)}


def replacements(transformer: nn.Module) -> dict[nn.Module, Callable]:
    """The function for each module of a transformer that has one.

    Raises ValueError, which names the module, for a block, a forward or an attention processor that is not known, for a
    module whose forward something has replaced already, and for a transformer without any block that is known.
    """
    found, blocks = {}, []
    for name, module in transformer.named_modules():
        kind = known_class(module)
        if kind is None:
            in_a_block = any(name.startswith(f"{block}.") for block in blocks[-1:])  # of which modules come in order
            if isinstance(module, nn.ModuleList) and not in_a_block:
                _check_blocks(name, module)
            continue
        _check_forward(name, module, kind)
        if kind in BLOCKS:
            blocks.append(name)
        found[module] = BLOCKS.get(kind) or LAYERS.get(kind) or _of_attention(name, module, kind)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no block that is known; known are {_names(BLOCKS)}")
    return found


def lora_layers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The LoRA layers that the modules call."""
    for module in modules:
        for child in module.children():
            for layer in child if isinstance(child, nn.ModuleList) else (child,):
                if hasattr(layer, "lora_A"):
                    yield layer


def known_class(module: nn.Module) -> type | None:
    """Its class, or the known one from which it derives: FSDP2 derives a class from a module's own."""
    return next((kind for kind in type(module).__mro__ if kind in CLASSES), None)


def _check_blocks(name: str, modules: nn.ModuleList) -> None:
    for number, block in enumerate(modules):
        if known_class(block) is None and any(block.children()):
            raise ValueError(
                f"{name}.{number} is a {type(block).__name__}, which is no block that is known; known are "
                f"{_names(BLOCKS)}"
            )


def _check_forward(name: str, module: nn.Module, kind: type) -> None:
    if type(module).forward is not kind.forward:
        raise ValueError(f"{name}, a {type(module).__name__}, has another forward than {kind.__name__}")
    if "flowbp_fused" in module.__dict__:
        raise ValueError("the ops have been applied to this transformer already: call undo() of their handle first")
    if "forward" in module.__dict__:
        other = getattr(module.forward, "func", module.forward)
        by = getattr(other, "__qualname__", type(other).__name__)
        raise ValueError(f"the forward of {name} ({kind.__name__}) was replaced by {by}: apply the ops before that")


def _of_attention(name: str, module: nn.Module, kind: type) -> Callable:
    processor = type(module.processor)
    if (kind, processor) not in ATTENTIONS:
        known = _names(processor for attention, processor in ATTENTIONS if attention is kind)
        raise ValueError(
            f"{name} has the attention processor {processor.__name__}, which no function re-states; known for "
            f"{kind.__name__} are {known}"
        )
    return ATTENTIONS[kind, processor]


def _names(classes: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in classes)
