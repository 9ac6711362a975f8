"""Frozen weights in fewer bits, for LoRA on a small card: NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), int8,
float8.

    format  library       a weight w is                                              bytes a weight
    nf4     bitsandbytes  one of 16 normal quantiles, times the largest |w| of 64    0.516: those scales have 8 bits
    int8    torchao       q s, q in -128 .. 127, s the largest |w| of a row / 127.5  1, and a scale a row
    float8  torchao       q s, q in e4m3, s the largest |w| of a row / 448           1, and a scale a row

A layer computes with W, the dequantised weights in the network's dtype:  y = x W^T + b,  and a cotangent g of y is g W
at x. Both are those of a plain layer that holds W, so the gradient of a LoRA is exact for the quantised network. That
is why int8 is torchao's and not bitsandbytes' LLM.int8, which rounds x as well and has the gradient of another function
than it computes. Backward dequantises again, so that a graph keeps no W.

Quantised are the linear layers in the blocks of the transformer, of the text encoders, or both: in the published models
over 94 % of a transformer's weights. The layers before and after the blocks stay plain, because they are few and their
errors reach every token. So do what a text encoder keeps in float32 (T5's `wo`) and, in NF4, layers whose rows are no
whole blocks of 64 weights: bitsandbytes 0.50 reads the scales of such rows in the wrong places on a CPU. The VAE is
never quantised.

diffusers' `PipelineQuantizationConfig` is not used. It asks for a GPU where bitsandbytes needs none. And it leaves out
layers by a part of their name, so that the proj_out of FLUX.1 cannot be told from those of its single blocks.
"""

from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline, TorchAoConfig
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn

from flowbp_kernels.dequantised_linear import DequantisedLinear


def quantise_pipeline(pipe: DiffusionPipeline, weights: str | None = None, text_encoders: str | None = None) -> None:
    """Quantise the transformer in the format `weights` and the text encoders in `text_encoders`, in place.
    Their libraries must be installed.
    """
    for name, part in pipe.components.items():
        kind = weights if name == "transformer" else text_encoders if name.startswith("text_encoder") else None
        if kind is not None and part is not None:
            quantise_blocks(part, kind)


def quantise_blocks(model: nn.Module, kind: str) -> None:
    """Quantise the linear layers in the blocks of a model of diffusers or transformers, in place."""
    if kind == "nf4":
        replace, model.is_loaded_in_4bit = nf4_layer, True  # which peft asks before it looks at the layers
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        config = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
        options = config(set_inductor_config=False)  # which are the whole process's
        model.hf_quantizer = DiffusersAutoQuantizer.from_config(TorchAoConfig(options))  # by which peft merges

        def replace(layer: nn.Linear) -> nn.Linear:
            quantize_(layer, options)
            layer.__class__ = DequantisedLinear
            return layer

    for parent, name in list(linear_layers(model, kind)):
        setattr(parent, name, replace(getattr(parent, name)).requires_grad_(False))
    model.is_quantized = True  # diffusers then refuses another dtype


def linear_layers(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of each linear layer in the model's blocks that the format `kind` quantises: not those that the
    model keeps in float32, nor in NF4 those whose rows are no whole blocks of 64 weights.
    """
    kept, split, block = model._keep_in_fp32_modules or (), model._no_split_modules, 64 if kind == "nf4" else 1
    for parent in {m: None for whole in model.modules() if type(whole).__name__ in split for m in whole.modules()}:
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in kept and child.in_features % block == 0:
                yield parent, name


def nf4_layer(layer: nn.Linear) -> nn.Linear:
    """`layer` with weights in NF4, quantised on the GPU if there is one: a CPU takes a minute of one core for each 1e9
    weights.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, bias = layer.weight, layer.bias
    with torch.device("meta"):
        new = Linear4bit(layer.in_features, layer.out_features, bias is not None, weight.dtype, quant_type="nf4")
    packed = Params4bit(weight.data, quant_type="nf4", compress_statistics=True)
    new.weight, new.bias = packed.to("cuda" if torch.cuda.is_available() else "cpu").to(weight.device), bias
    # Some CPUs have a kernel for inference. It repacks the weights, into a form that has no gradient, and rounds to
    # bfloat16.
    new.support_avx512bf16_for_cpu = False
    return new.train(layer.training)
