"""What the engine asks of a backbone, and what the pipelines of diffusers share.

Latents are always spatial, [B, C, h, w]. Where a network reads a sequence of patches, only `velocity` knows of it. The
rollout nevertheless equals the pipeline's bit for bit: packing into patches permutes the entries of a latent, and an
Euler step acts on each entry by itself.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from flowbp import log
from flowbp.guidance import Conditioning, Guidance, GuidedVelocity

Precision = Literal["pipeline", "float32"]
NoiseLevels = Literal["published", "pipeline"]
GuidanceBranches = Literal["batched", "separate", "none"]

# Layers of the attention in a block that joins image and text, as SD3 and FLUX name them.
JOINT_LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
JOINT_ATTENTION = [f"attn.{layer}" for layer in JOINT_LAYERS.split()]


class Backbone(ABC):
    """A text-to-image flow model in five verbs, and what the trainer must know of its network: a pipeline of diffusers
    whose scheduler takes plain Euler steps of flow matching.

    pipe               the pipeline, for saving and loading weights in its own format
    denoiser           the network that gives the velocity: the trainable part
    lora_targets       modules of the denoiser that LoRA adapts by default
    text_options       what prompt embeddings depend on besides the text encoders
    guidance_branches  how classifier-free guidance calls the network; "none": the guidance was distilled away
    embeds_guidance    whether the network reads conditioning["guidance"] [B] float32, a guidance scale
    dispatches_attention  whether its attention takes each kernel that diffusers knows, or PyTorch's alone
    capturable         whether a CUDA graph can repeat `velocity`: no shape in it depends on the values of a tensor

    precision            of the latents between network calls. "pipeline": the network's dtype, so that they are rounded
                         after every step, as the pipeline does. "float32": only the network's input is rounded
    max_sequence_length  tokens of the prompt embedding; None means the pipeline's default
    """

    lora_targets: list[str]
    guidance_branches: GuidanceBranches = "separate"
    embeds_guidance = False
    dispatches_attention = capturable = True
    patch = 2  # latents that one image token spans, along each side
    default_text_tokens = 512

    def __init__(
        self, pipe: DiffusionPipeline, precision: Precision = "float32", max_sequence_length: int | None = None
    ):
        scheduler = pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
            rule = "a rollout takes the deterministic steps of FlowMatchEulerDiscreteScheduler"
            way_out = "give the pipeline one made from its config, with stochastic_sampling off"
            raise ValueError(f"{type(pipe).__name__} samples by {type(scheduler).__name__}; {rule}: {way_out}")
        for name, needed in {"num_train_timesteps": 1000, "invert_sigmas": False}.items():
            if scheduler.config.get(name, needed) != needed:
                wrong = f"the scheduler has {name}={scheduler.config[name]}, but time is 1000 sigma here and falls to 0"
                raise ValueError(f"{wrong}: set {name} to {needed} in scheduler/scheduler_config.json")
        if pipe.vae.config.get("shift_factor", 0) is None:
            raise ValueError("a VAE cannot decode without shift_factor: set shift_factor (0: none) in vae/config.json")
        if precision not in ("pipeline", "float32"):
            raise ValueError(f"precision must be 'pipeline' or 'float32', not {precision!r}")
        self.pipe = pipe
        self.latents_dtype = self.pipeline_dtype if precision == "pipeline" else torch.float32
        self.text_options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)

    @property
    def denoiser(self) -> ModelMixin:
        return self.pipe.transformer

    @property
    def text_tokens(self) -> int:
        """Tokens to which T5 or Qwen pads a prompt. CLIP has a length of its own."""
        return self.text_options.get("max_sequence_length", self.default_text_tokens)

    @property
    def text_device(self) -> torch.device:
        """Where the text encoders are, which need not be where the network is (`flowbp.runtime.embeddings`)."""
        return self.pipe.text_encoder.device

    @property
    def pipeline_dtype(self) -> torch.dtype:
        """The dtype in which the pipeline keeps its latents."""
        return self.denoiser.dtype

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text conditioning of `prompts`, without gradient."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the network reads of a prompt."""
        return self.text_tokens

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's conditioning by name, at its full length. It is read from the configs, because the
        text encoders may not be loaded.
        """
        config = self.denoiser.config
        pooled = {"pooled_projections": (config.pooled_projection_dim,)} if "pooled_projection_dim" in config else {}
        return {"encoder_hidden_states": (self.prompt_tokens, config.joint_attention_dim)} | pooled

    def warn_of_cut(self, prompts: list[str], **template: Any) -> None:
        """Say which prompts are longer than what the network reads of them, for pipelines that do not say it.

        template: options of the tokenizer's chat template.
        """
        tokenizer = self.pipe.tokenizer
        for prompt in prompts:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **template)
            if (count := len(tokenizer(text).input_ids)) > self.text_tokens:
                cut = f"has {count} tokens with its template, of which {self.text_tokens} are read"
                log.warning("the prompt %.60r %s: raise backbone.max_sequence_length", prompt, cut)

    def pipeline_levels(self, num_steps: int) -> dict[str, Any]:
        """The arguments by which the pipeline names its noise levels, before their shift, to `set_timesteps`. Most
        pipelines sample on the published levels.
        """
        return {"sigmas": published_levels(num_steps)}

    def shift(self, num_steps: int, num_tokens: int) -> float:
        """mu of the scheduler's dynamic shift, linear in the number of image tokens: larger images stay noisy for
        longer.
        """
        of = self.pipe.scheduler.config
        return calculate_shift(num_tokens, of.base_image_seq_len, of.max_image_seq_len, of.base_shift, of.max_shift)

    def sigmas(self, num_steps: int, height: int, width: int, levels: NoiseLevels = "published") -> Tensor:
        """[num_steps + 1] float32 noise levels on the CPU, decreasing to 0, for images of height x width pixels.

        levels: "published" is linspace(1, 1 / N, N) under the pipeline's shift, on which the paper's released trainers
            roll out. "pipeline" is the sampler's own, on which a user of the model draws. They differ for SD3 alone,
            whose sampler ends next to 0.
        """
        rows, columns = self.token_grid(height, width)
        scheduler = self.pipe.scheduler
        published = {"sigmas": published_levels(num_steps)}
        arguments = published if levels == "published" else self.pipeline_levels(num_steps)
        if scheduler.config.use_dynamic_shifting:
            arguments["mu"] = self.shift(num_steps, rows * columns)
        scheduler.set_timesteps(**arguments)  # never scheduler.step, which counts the steps it takes
        return scheduler.sigmas.cpu().clone()

    def noise(self, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
        """Standard normal latents [B, C, h, w] at the first noise level, one generator a sample."""
        rows, columns = self.token_grid(height, width)
        shape = (len(generators), *self.latent_shape(rows, columns))
        return randn_tensor(shape, generator=generators, device=self.denoiser.device, dtype=self.latents_dtype)

    def latent_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of rows x columns image tokens."""
        return self.pipe.vae.config.latent_channels, rows * self.patch, columns * self.patch

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at latents x [B, C, h, w] and noise level sigma, [] or one a sample [B]. It is in the
        network's dtype; the step converts it.
        """

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32 (or wider), differentiable in the clean latents x."""
        vae = self.pipe.vae
        images = vae.decode(self.vae_latents(x).to(vae.dtype), return_dict=False)[0]
        images = self.pipe.image_processor.postprocess(images, output_type="pt")
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def vae_latents(self, x: Tensor) -> Tensor:
        """Clean latents x in the units and the shape of the VAE."""
        vae = self.pipe.vae
        return x / vae.config.scaling_factor + vae.config.shift_factor

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of image tokens. Raises ValueError for a size that the tokens do not tile."""
        side = self.pipe.vae_scale_factor * self.patch
        if height % side or width % side:
            images = f"{type(self.pipe).__name__} draws images whose sides are multiples of {side} pixels"
            raise ValueError(f"{images}, not {height} x {width}")
        return height // side, width // side


def published_levels(num_steps: int) -> np.ndarray:
    """[num_steps] noise levels from 1 to 1 / num_steps, before their shift."""
    return np.linspace(1.0, 1 / num_steps, num_steps)


def grid_ids(*sizes: int, device: torch.device) -> Tensor:
    """[product of sizes, number of sizes] int64: every position of a grid, the last coordinate fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def check_guidance(backbone: Backbone, guidance: Guidance) -> None:
    """Raise ValueError when the network cannot be guided as `guidance` says."""
    name = type(backbone.pipe).__name__
    if guidance.active and backbone.guidance_branches == "none":
        raise ValueError(f"this {name} takes no negative prompt: set guidance.scale to 1, not {guidance.scale}")
    if backbone.embeds_guidance and guidance.embedded is None:
        raise ValueError(f"this {name} takes a guidance scale as input: set guidance.embedded (FLUX.1-dev: 3.5)")
    if guidance.embedded is not None and not backbone.embeds_guidance:
        raise ValueError(f"this {name} takes no guidance scale: set guidance.embedded to null, not {guidance.embedded}")


def bind_velocity(
    backbone: Backbone, prompts: list[str], guidance: Guidance, timesteps: Literal["float32", "bfloat16"] = "float32"
) -> GuidedVelocity:
    """The guided velocity of a batch of prompts; the negative prompt is empty.

    timesteps: the dtype to which the network's input 1000 sigma is rounded. The rollout's own steps are not rounded.
    Raises ValueError when the network cannot be guided as `guidance` says.
    """
    check_guidance(backbone, guidance)
    embedded, negative = {}, None
    if guidance.embedded is not None:
        embedded["guidance"] = torch.full((len(prompts),), guidance.embedded, device=backbone.denoiser.device)
    if guidance.active:
        empty = backbone.encode([""]).items()
        negative = {name: value.expand(len(prompts), *value.shape[1:]) for name, value in empty} | embedded

    @functools.wraps(backbone.velocity)
    def with_rounded_time(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return backbone.velocity(x, (1000 * sigma).bfloat16().to(sigma.dtype) / 1000, conditioning)

    network = backbone.velocity if timesteps == "float32" else with_rounded_time
    positive, batched = backbone.encode(prompts) | embedded, backbone.guidance_branches == "batched"
    return GuidedVelocity(network, positive, negative, guidance, batched)
