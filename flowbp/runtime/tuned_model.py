"""The model of a run: a backbone on its device, what is trained of it, its float32 copies and its average."""

import copy
import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from flowbp.anchor import Anchor
from flowbp.backbones import load_backbone
from flowbp.backbones.base import Backbone, check_guidance
from flowbp.config import RunConfig
from flowbp.methods import draw_plan
from flowbp.runtime.distributed import Ranks
from flowbp.runtime.embeddings import embed_once
from flowbp.runtime.memory import compile_blocks, offload, save_memory
from flowbp.runtime.tuning import assign, master_weights, moving_average, trainable_parameters, trained
from flowbp.runtime.weights import base_weights, load_weights, start_from
from flowbp_kernels.attention import try_attention


class TunedModel:
    """The model of a run. Nothing else builds one, because another order of building would fail or waste memory:

        load on the CPU -> add LoRA, or start from `tuning.init` -> embed the prompts -> drop the text encoders
        -> memory switches -> offload or compile the blocks -> copy or shard over the processes -> master weights
        -> average

    backbone    the pipeline behind its five verbs, on the device
    sigmas      [N + 1] noise levels of the training rollout
    ranks       the processes that share the network
    parameters  what is trained, by name, as the network computes with it; shards, if the weights are sharded
    masters     what the optimizer steps, by the same names: float32 copies of narrower parameters, and the other
                parameters themselves
    ema         the moving average of the masters in float32, or None
    anchor      what holds the model near its base, or None
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, texts: Iterable[str], backbone: Backbone | None = None
    ):
        """texts: every prompt that the run will draw. backbone: takes the place of the one that `config` names."""
        self.config = config
        self.backbone = backbone or load_backbone(**config.backbone.model_dump())
        try_attention(config.backbone.attention, accelerator.device, self.backbone.denoiser.dtype, gradient=True)
        check_guidance(self.backbone, config.guidance)
        size = config.rollout
        self.sigmas = self.backbone.sigmas(size.num_steps, size.height, size.width, size.sigmas)
        # raises if the method does not fit
        draw_plan(config.method, self.sigmas.double().numpy(), np.random.default_rng(0), size.solver)
        torch.manual_seed(config.seed)  # LoRA's initial weights
        begin = trainable_parameters if config.tuning.init is None else partial(start_from, config.tuning.init)
        parameters = begin(self.backbone, config.tuning)
        lora = parameters if config.tuning.mode == "lora" else {}
        self._start = {name: p.detach().to("cpu", copy=True) for name, p in lora.items()}
        if config.data.embeddings == "cached":
            embed_once(self.backbone, texts, config.data.cache, accelerator.device, bool(config.memory.offload))
        options, self._copy = config.anchor, None
        self.anchor = None if options is None else Anchor(options.kind, options.weight, self.as_base)
        if options is not None and options.copy_base:
            self._copy = copy.deepcopy(self.backbone.denoiser).requires_grad_(False).to(accelerator.device)
        save_memory(self.backbone, config.memory)
        if config.memory.offload:
            offload(self.backbone, accelerator.device)
        if config.compile is not None:
            compile_blocks(self.backbone.denoiser, config.compile)
        self.ranks = Ranks(accelerator, self.backbone, config.memory)
        self.parameters = trained(self.backbone)
        self.masters = master_weights(self.parameters) if config.tuning.master_weights else self.parameters
        self.ema = None if config.ema is None else moving_average(self.masters, config.ema)

    def take_gradients(self) -> None:
        """Move each parameter's gradient to its master weight. Raises ValueError if a trained parameter has none."""
        if missing := [name for name, p in self.parameters.items() if p.grad is None]:
            what = f"{len(missing)} of {len(self.parameters)} trained parameters take no part in the velocity"
            raise ValueError(f"{what}, such as {missing[0]}, and would never change: name others in tuning.targets")
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter and parameter.grad is not None:
                self.masters[name].grad, parameter.grad = parameter.grad.to(self.masters[name].dtype), None

    def follow_masters(self) -> None:
        """Round the master weights into the network, and move the average a step towards them."""
        assign(self.parameters, self.masters)
        if self.ema is not None:
            self.ema.step(self.masters.values())

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights that the run started from: its first LoRA, or all weights, which are read again."""
        return self._start or base_weights(self.backbone, self.config.backbone.variant, self.config.tuning.init)

    @property
    def tuned(self) -> dict[str, Tensor]:
        """The weights that a run delivers: the average if there is one, else the last ones."""
        return self.parameters if self.ema is None else dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The network is the base model for the block: without its adapter, or as the copy that was made of it."""
        pipe, own = self.backbone.pipe, self.backbone.denoiser
        if self._copy is None:
            own.disable_adapters()
        else:
            pipe.transformer = self._copy
        try:
            yield
        finally:
            pipe.transformer = own
            if self._copy is None:
                own.enable_adapters()

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[Backbone]:
        """The backbone with its trained parameters set to `weights` for the block.

        Meanwhile the own weights wait on the CPU, or as a copy beside them if they are shards.
        """
        own = {name: p.detach() for name, p in self.parameters.items()}
        kept = {name: p.to("cpu", copy=True) if self.ranks.sharded is None else p.clone() for name, p in own.items()}
        try:
            assign(self.parameters, weights)
            yield self.backbone
        finally:
            assign(self.parameters, kept)


def frozen_backbone(
    config: RunConfig, weights: Path | None, device: str, texts: Iterable[str] | None = None, strength: float = 1.0
) -> Backbone:
    """The backbone of a config with the tuned `weights` at `strength`, or without, on `device`: to draw with, not to
    train.

    texts: all prompts that will be drawn, to embed as `config.data.embeddings` says. None leaves the text encoders in
    place.
    """
    gc.collect()  # blocks whose forward was replaced refer to themselves: the last model's weights would stay
    backbone = load_backbone(**config.backbone.model_dump())
    try_attention(config.backbone.attention, device, backbone.denoiser.dtype, gradient=False)
    if weights is not None:
        load_weights(backbone, weights, strength=strength)
    if texts is not None and config.data.embeddings == "cached":
        embed_once(backbone, texts, config.data.cache, device, bool(config.memory.offload))
    if config.memory.offload:
        offload(backbone, device)
    backbone.pipe.to(device)
    return backbone
