"""What is trained of a network, and what the optimizer steps.

A bfloat16 weight has 8 bits: a step below about 1/500 of it is rounded away, and at the learning rates of fine-tuning
most steps are. So the optimizer, the average and the checkpoints hold master weights in float32 (Micikevicius et al.
2018, arXiv 1710.03740), and the network computes with its own rounding of them.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowbp import log
from flowbp.config import ConfigError
from flowbp.config.schema import OptimizerConfig, TuningConfig
from flowbp.given import nearest, short
from flowbp.runtime.distributed import shard_like

if TYPE_CHECKING:  # importing it takes seconds, and whoever checks a command's input does without
    from flowbp.backbones.base import Backbone


def trainable_parameters(backbone: "Backbone", tuning: TuningConfig) -> dict[str, Tensor]:
    """Add a LoRA adapter to the denoiser, or unfreeze it whole; returns the parameters to train by name.

    Raises ConfigError for a target that names no linear layer.
    """
    denoiser = backbone.denoiser
    if tuning.mode == "lora":
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        check_targets(denoiser, tuning.targets or [])
        targets, alpha = tuning.targets or backbone.lora_targets, tuning.alpha or tuning.rank
        lora = LoraConfig(r=tuning.rank, lora_alpha=alpha, lora_dropout=tuning.dropout, target_modules=targets)
        denoiser.add_adapter(lora)
        cast_training_params(denoiser, torch.float32)  # small updates of bfloat16 weights would be rounded away
    else:
        denoiser.requires_grad_(True)
        if denoiser.dtype == torch.bfloat16 and not tuning.master_weights:
            lost = "a step changes a weight by about optimizer.lr, and is rounded away below about 1/500 of the weight"
            log.warning("all weights are trained in bfloat16: %s; tuning.master_weights=true keeps every step", lost)
    return trained(backbone)


def check_targets(denoiser: nn.Module, targets: Iterable[str]) -> None:
    """Raise ConfigError unless each of `targets` names linear layers, by the end of their names, and nothing else."""
    modules = dict(denoiser.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        others = [name for name in found if name not in linear]
        if others or not found:
            what = f"{others[0]}, of class {type(modules[others[0]]).__name__}," if others else "no layer"
            ends = sorted({".".join(name.split(".")[-1 - target.count(".") :]) for name in linear})
            rule = f"{nearest(target, ends)}name linear layers, by the end of their names: {', '.join(ends[:8])}"
            raise ConfigError(f"tuning.targets: {short(target)} names {what} of this {type(denoiser).__name__}; {rule}")


def trained(backbone: "Backbone") -> dict[str, Tensor]:
    """The denoiser's parameters that require grad, by name."""
    return {name: p for name, p in backbone.denoiser.named_parameters() if p.requires_grad}


def master_weights(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies of narrower parameters, sharded as they are; wider ones are their own."""
    return {name: p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_() for name, p in parameters.items()}


def moving_average(masters: Mapping[str, Tensor], decay: float) -> Any:
    """diffusers' EMAModel, of constant decay from the first step on.

    It is in float32, because it moves by only (1 - decay) of a step.
    """
    from diffusers.training_utils import EMAModel

    shadows: Any = master_weights(masters).values()
    return EMAModel(shadows, decay=decay, min_decay=decay, update_after_step=-1)


def build_optimizer(parameters: Iterable[Tensor], options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, its moments in the parameters' dtype, or in 8 bits. On a GPU it is one kernel, without a copy of the
    weights. Raises ConfigError where bitsandbytes is missing.
    """
    parameters = list(parameters)
    kind = partial(torch.optim.AdamW, fused=all(p.is_cuda for p in parameters))
    if options.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind  # pyright: ignore
        except ImportError as error:
            raise ConfigError(f"optimizer.name=adamw8bit: {error}; pip install bitsandbytes, or use adamw") from error
    return kind(parameters, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)


@torch.no_grad()
def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set `parameters` to `values`, in place; sharded ones take their part of a whole value."""
    for name, parameter in parameters.items():
        if values[name] is not parameter:
            parameter.copy_(shard_like(parameter, values[name]))
