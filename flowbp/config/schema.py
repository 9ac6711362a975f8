"""Everything that a run's config may say: types, defaults, bounds and what must fit together.

Unknown keys are errors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainSerializer, Tag
from pydantic import model_validator as validator

from flowbp.backbones import KNOWN_MODELS
from flowbp.config import values
from flowbp.config.registry import FINITE, ConfigError, Unimported, describe, from_mapping, unknown
from flowbp.given import IMAGE_STATISTICS, cut, short
from flowbp.guidance import Guidance
from flowbp.methods import Plans, draw_plan
from flowbp.quadrature import Solver
from flowbp.rewards import Relative, Reward, Smoothing, check_options, load_reward

# Names that no reward or monitor may have: the columns that the trainer logs (a test keeps them equal) and `SCORED`.
LOGGED = "step nodes images loss grad_norm sample_grad_norm d_j d_0 kept drift skipped lr seconds peak_mb".split()
SCORED = ["prompt", "category", "seed", "checker", "embedding", *IMAGE_STATISTICS]  # columns of an evaluation


def key(default: Any, description: str) -> Any:
    """A key of the config with its default; `...` where the config must name a value."""
    return Field(default, description=description)


class Strict(BaseModel):
    """A section of the config. What must fit together within it is checked in `model_post_init`."""

    model_config = ConfigDict(extra="forbid", frozen=True) | FINITE

    @validator(mode="before")
    @classmethod
    def _known_keys_only(cls, given: Any) -> Any:
        for name in given if isinstance(given, Mapping) else ():
            if name not in cls.model_fields:
                if homes := [f"{section}.{name}" for section, inner in cls.sections() if name in inner.model_fields]:
                    raise ConfigError(f"unknown key {name!r}; did you mean {' or '.join(homes)}?")
                raise unknown("key", name, cls.model_fields)
        return given

    @classmethod
    def sections(cls) -> Iterator[tuple[str, type["Strict"]]]:
        """The keys that are sections of their own, each with its class."""
        for name, field in cls.model_fields.items():
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Strict):
                    yield name, kind


# -- the run -----------------------------------------------------------------------------------------------------------


class QuantiseConfig(Strict):
    """Frozen weights in fewer bits (`flowbp.backbones.quantise`); null leaves them as they are."""

    weights: values.Bits | None = key(None, "of the transformer's blocks: nf4, int8 or float8; needs tuning.mode=lora")
    text_encoders: values.Bits | None = key(None, "of the text encoders' blocks")


class BackboneConfig(Strict):
    name: values.Place = key(..., '"shapes", a known model, a local diffusers folder or a Hub id')
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    precision: Literal["pipeline", "float32"] = key("float32", "of the latents between network calls")
    max_sequence_length: values.Size | None = key(None, "tokens of the prompt embedding; null: the pipeline's default")
    variant: values.Text | None = key(None, "of the weight files: fp16 for model.fp16.safetensors")
    kernels: values.Kernels = key("off", "fused ops in the transformer's blocks: auto, where these are known, or off")
    quantise: Annotated[QuantiseConfig | None, values.OfWeights] = key(None, "fewer bits; nf4 means {weights: nf4}")
    attention: values.Text = key("auto", "cuDNN first on capability 9.0; native: PyTorch's choice; or a kernel's name")
    vae_channels_last: bool = key(False, "the VAE's decoder in the memory format channels_last")
    cuda_graph: bool = key(False, "passes without gradient as a CUDA graph; for small batches")


class RolloutConfig(Strict):
    """The sampler. Published noise levels are linspace(1, 1/N, N) under the pipeline's shift. The released SD3.5 code
    has timesteps in bfloat16."""

    num_steps: values.Steps = 25
    solver: Solver = key("euler", "adams-2 and adams-3 read the last two or three velocities: Adams-Bashforth")
    height: values.Pixels = 512
    width: values.Pixels = 512
    sigmas: values.Levels = key("published", "noise levels: the published ones, or those of the pipeline's own sampler")
    timesteps: Literal["float32", "bfloat16"] = key("float32", "dtype of the time 1000 sigma that the network reads")


class ScorerConfig(Strict):
    """A reward model and where its weights are."""

    name: values.Text = key("clip", "one of `flowbp rewards`, or a function of your own as module:function")
    model: values.Place | None = key(None, 'a folder, a Hub id, "shapes" or "shapes-monitor"; null: the published one')
    dtype: Literal["float32", "bfloat16", "tf32"] | None = key(None, "of the weights, or tf32; null: the reward's own")
    revision: values.Text | None = key(None, "commit of a Hub checkpoint")
    sha256: values.Sha256 | None = key(None, "digest of the checkpoint file")

    def model_post_init(self, _):
        check_options(self.name, self.model, self.dtype, self.revision, self.sha256)

    def load(self, device: str = "cpu") -> Reward:
        return load_reward(self.name, self.model, device, self.dtype, self.revision, self.sha256)


class RewardConfig(ScorerConfig):
    """A reward to train on, and its part in the loss. Several are a mapping from names of your choice to such specs."""

    weight: values.Positive = 1.0
    hinge: values.Real | None = key(None, "target in the reward's own units, without gradient above it; null: none")
    normalise: bool = key(False, "divide the loss by the running deviation of the reward")
    smooth: Annotated[Smoothing | None, from_mapping(Smoothing)] = None
    relative: Annotated[Relative | None, from_mapping(Relative)] = None

    def term(self, device: str = "cpu", reward: Reward | None = None) -> Any:
        """The `Term` of the reward, which is loaded unless it is given: imports torch."""
        from flowbp.rewards.weighted import Objective, RunningScale, Term

        scale = RunningScale() if self.normalise else None
        return Term(reward or self.load(device), Objective(self.hinge), self.weight, self.smooth, scale, self.relative)


def is_one_reward(spec: Mapping[str, Any]) -> bool:
    """Whether `spec` holds the fields of one reward; if not, it maps names to several, each a mapping itself."""
    return any(name in RewardConfig.model_fields or not isinstance(value, Mapping) for name, value in spec.items())


def by_name(rewards: Any) -> Any:
    """One reward is short for {"reward": it}."""
    return {"reward": rewards} if isinstance(rewards, Mapping) and is_one_reward(rewards) else rewards


def shortest(rewards: dict[str, RewardConfig]) -> Any:
    """The inverse of `by_name`."""
    dumped = {name: reward.model_dump(mode="json") for name, reward in rewards.items()}
    return dumped["reward"] if dumped.keys() == {"reward"} else dumped


RewardSpecs = dict[values.MetricName, RewardConfig]
RewardsField = Annotated[RewardSpecs, Field(min_length=1), BeforeValidator(by_name), PlainSerializer(shortest)]


class DataConfig(Strict):
    """Prompts. "cached" embeds all once, to disk, and releases the text encoders; "live" encodes every batch."""

    prompts: values.Place = key(..., 'a file or folder of prompts, or "shapes:train"')
    batch_size: values.Size = 8
    accumulate: values.Count = key(1, "micro-batches an optimizer step")
    embeddings: Literal["cached", "live"] = key("cached", "embed all prompts once, or every batch anew")
    cache: values.Cache | None = key(None, "folder of cached embeddings; null: $FLOWBP_CACHE, else ~/.cache/flowbp")


class MemoryConfig(Strict):
    """Memory against time. Only vae_tiling changes the gradient, because it blends the seams of its tiles."""

    recompute: Literal["always", "never", "auto"] = key("always", "replay nodes, keep their graphs, or keep what fits")
    budget_gb: values.NonNegative | None = key(None, "1e9 bytes for graphs kept by recompute=auto; null: what is free")
    nodes_per_forward: values.Size = key(1, "active nodes replayed in one batched forward pass")
    reward_batch: values.Size | None = key(None, "samples decoded and scored at a time; null takes the whole batch")
    checkpointing: bool = key(False, "keep only the inputs of the transformer's blocks, and run them again in backward")
    offload: Literal["blocks"] | None = key(None, "blocks: frozen weights in CPU memory, two blocks at a time")
    vae_checkpointing: bool = key(False, "the same in the VAE's decoder")
    vae_slicing: bool = key(False, "decode one image at a time; saves memory together with vae_checkpointing")
    vae_tiling: bool = key(False, "decode images above the VAE's own sample size in overlapping tiles, blended")
    shard: values.Shards = key(False, "split weights (FSDP2) over all processes, or those of a node; false: copy them")
    gather: Literal["auto", "rollout", "block"] = key("auto", "shards: once a rollout, at every pass, or what fits")
    shard_gradients: bool = key(False, "with shard: split gradients after every backward pass, not once a step")

    def model_post_init(self, _):
        if self.shard_gradients and not self.shard:
            raise ValueError("shard_gradients=true needs shard=all or node: gradients are split as the weights are")
        if self.offload and not self.checkpointing:
            raise ValueError("offload=blocks needs checkpointing=true, or graphs would keep all blocks on the device")
        if self.offload and self.shard:
            raise ValueError("offload=blocks needs shard=false: each process has its frozen weights in CPU memory")
        if self.budget_gb is not None and self.recompute != "auto":
            raise ValueError(f"budget_gb={self.budget_gb} needs recompute=auto, not {self.recompute}, to limit graphs")


class TuningConfig(Strict):
    mode: Literal["lora", "full"] = "lora"
    init: values.Folder | None = key(None, "a run, its checkpoint, a LoRA file or a transformer folder to start from")
    init_sha256: values.Sha256 | None = key(None, "digest of its files; a run fills it in")
    rank: values.Size = key(16, "of the LoRA matrices")
    alpha: values.Positive | None = key(None, "LoRA scale numerator; null means equal to rank")
    dropout: values.Decay = key(0.0, "of the LoRA branches' inputs; replays draw the rollout's masks again")
    targets: Annotated[list[values.Text], Field(min_length=1)] | None = key(None, "modules; null: the backbone's own")
    master_weights: bool = key(True, "let the optimizer step float32 copies of trained weights that are narrower")

    def model_post_init(self, _):
        given = {"alpha": self.alpha, "dropout": self.dropout or None, "targets": self.targets}
        for name, value in given.items():
            if self.mode == "full" and value is not None:
                raise ValueError(f"{name}={cut(value)} is a setting of LoRA: leave it out, or use mode=lora")


class AnchorConfig(Strict):
    """A penalty on how far the trained velocity is from the base model's (`flowbp.anchor`)."""

    kind: Literal["velocity", "norm"] = key("velocity", "penalise every difference, or only greater length")
    weight: values.Positive = key(..., "of the penalty beside the reward")
    copy_base: bool = key(False, "tuning.mode=full: hold the base model as a frozen copy of all weights")


class OptimizerConfig(Strict):
    name: Literal["adamw", "adamw8bit"] = key("adamw", "adamw8bit needs bitsandbytes and a GPU")
    lr: values.Positive = 1e-4
    betas: tuple[values.Decay, values.Decay] = (0.9, 0.999)
    eps: values.Positive = 1e-8
    weight_decay: values.NonNegative = 1e-4
    warmup: values.Whole = key(0, "steps of linear warm-up")
    max_grad_norm: values.Positive = 1.0
    max_sample_grad_norm: values.Positive | None = key(None, "clip each sample's reward gradient at the reward input")


class GenEvalConfig(Strict):
    """GenEval's judgement of `evaluation.prompts`, which must then be its evaluation_metadata.jsonl. The thresholds are
    those it uses with Mask2Former; a detector with scores of another kind needs its own."""

    detector: values.Place = key(..., "a local folder or Hub id: OWLv2, Grounding DINO, Mask2Former, DETR, ...")
    colours: values.Place = key(..., "a local folder or Hub id of a CLIP model; GenEval: openai/clip-vit-large-patch14")
    threshold: values.Share = key(0.3, "least score of a detection")
    counting_threshold: values.Share = key(0.9, "the same for prompts with the tag 'counting'")


def known_checker(name: str) -> str:
    if name != "shapes" and ":" not in name:
        known = "shapes, a loader of your own as module:function, {detector: ...} of GenEval, or null"
        raise ValueError(f"unknown checker {short(name)}; known: {known}")
    return name


CheckerField = Annotated[
    Annotated[str, AfterValidator(known_checker), Tag("name")] | Annotated[GenEvalConfig, Tag("geneval")],
    Discriminator(lambda spec: "name" if isinstance(spec, str) else "geneval"),
]


def without_nulls(monitors: Any) -> Any:
    """A monitor that is null is left out, so that a run can drop one of its preset. null in place of all drops all."""
    if not isinstance(monitors, Mapping):
        return {} if monitors is None else monitors
    return {name: spec for name, spec in monitors.items() if spec is not None}


class EvaluationConfig(Strict):
    """The images that are scored after training, and with `every` during training too. num_steps, solver, sigmas and
    interval are those of their rollout, whatever training uses; num_steps=null means as many as in training."""

    prompts: values.Place
    samples: values.Samples = 256
    batch_size: values.Size = 64
    seed: values.Seed = 1234
    num_steps: values.Steps | None = key(None, "rollout steps of the images that are scored; null means as in training")
    solver: Solver = key("euler", "of those rollouts")
    sigmas: values.Levels = key("pipeline", "their noise levels, as in rollout.sigmas")
    interval: tuple[values.Share, values.Share] | None = key(None, "their guidance.interval")
    monitors: Annotated[dict[values.MetricName, ScorerConfig], BeforeValidator(without_nulls)] = key({}, "held out")
    watch: bool = key(True, "let the monitors score every training step; false loads them to evaluate only")
    checker: CheckerField | None = None
    grid: values.Size = key(16, "images in the before/after grids")
    every: values.Count | None = key(None, "steps between evaluations during training; null makes none")
    validation_prompts: values.Place | None = key(None, "prompts of those; null: `prompts`, which then chose the best")
    validation_samples: values.Samples = Field(96, ge=2)
    best: str | None = key(None, "held-out metric (a monitor or checker) by which the best step's weights are kept")
    patience: values.Count | None = key(None, "stop after so many evaluations without a new best step")

    def load_monitors(self, device: str = "cpu") -> dict[str, Reward]:
        return {name: spec.load(device) for name, spec in self.monitors.items()}

    @property
    def held_out(self) -> list[str]:
        """The metrics that are never trained on: the monitors, and the checker if there is one."""
        return [*self.monitors, *(["checker"] if self.checker is not None else [])]

    def model_post_init(self, _):
        if self.best is not None and self.best not in self.held_out:
            raise unknown("held-out metric for evaluation.best", self.best, self.held_out)
        for name in ("best", "validation_prompts"):
            if (value := getattr(self, name)) is not None and self.every is None:
                raise ValueError(f"{name}={cut(value)} needs every: the steps between evaluations during training")
        if self.patience is not None and self.best is None:
            raise ValueError(f"patience={self.patience} needs best: the held-out metric that must improve")


class RunConfig(Strict):
    """Everything a run needs; a resolved copy is written beside its results.

    plans: "shared" draws one plan an optimizer step, as published; "per_batch" one a micro-batch; "per_sample" one a
    sample; "stratified" one a sample, such that they cover the trajectory together.
    """

    output: values.Folder
    seed: values.Seed = 42
    steps: values.Count = 300
    checkpoint_every: values.Count = 100
    backbone: BackboneConfig
    rollout: RolloutConfig = RolloutConfig()
    guidance: Annotated[Guidance, from_mapping(Guidance)] = Guidance()
    method: values.MethodField
    plans: Plans = key("shared", "how many plans a step draws: one, one a micro-batch, or one a sample")
    reward: RewardsField
    data: DataConfig
    memory: MemoryConfig = MemoryConfig()
    compile: values.Backend | None = key(None, "torch.compile backend of transformer blocks: inductor; null: eager")
    tuning: TuningConfig = TuningConfig()
    anchor: AnchorConfig | None = key(None, "what holds the model near its base: {weight: 0.1}")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[float, values.Number, Field(gt=0, lt=1)] | None = key(None, "decay of the weights' moving average")
    evaluation: EvaluationConfig | None = None

    def model_post_init(self, _):
        self._what_goes_together()
        self._the_anchor_has_a_base()
        self._one_name_a_metric()
        self._method_fits_the_rollout()
        self._tokens_tile_the_image()

    def _what_goes_together(self):
        dropout, memory, full = self.tuning.dropout, self.memory, self.tuning.mode == "full"
        needs = {"memory.recompute": (memory.recompute, "always"), "tuning.dropout": (dropout, 0.0)}
        for name, (value, needed) in needs.items():
            if self.plans in ("per_sample", "stratified") and value != needed:
                why = "samples replay their own nodes; or plans=shared"
                raise ValueError(f"plans={self.plans} needs {name}={needed}, not {value}: {why}")
        if dropout and self.memory.nodes_per_forward > 1:
            raise ValueError(f"tuning.dropout={dropout} needs memory.nodes_per_forward=1: masks are drawn node by node")
        kind = self.backbone.quantise and self.backbone.quantise.weights
        refused = {
            "tuning.mode=full": full and "quantised weights have no gradient",
            f"memory.shard={self.memory.shard}": self.memory.shard and "quantised weights are not split",
            f"compile={self.compile}": self.compile and kind != "nf4" and "torch.compile fails on torchao's tensors",
        }
        for name, why in refused.items():
            if kind is not None and why:
                raise ValueError(f"{name} with backbone.quantise.weights={kind}: {why}; leave one of the two out")
        moved = {"tuning.dropout": dropout, "memory.offload": memory.offload, "memory.shard": memory.shard}
        if self.backbone.cuda_graph and (found := [n for n, v in (moved | {"anchor": self.anchor}).items() if v]):
            why = "a graph repeats the same kernels on weights that stay where they are"
            raise ValueError(f"backbone.cuda_graph=true with {found[0]}: {why}; leave one of the two out")
        if self.memory.offload and full:
            raise ValueError("memory.offload=blocks needs tuning.mode=lora: all weights are trained, none is frozen")
        if self.memory.offload and self.compile is not None:
            raise ValueError(f"memory.offload=blocks needs compile=null, not {self.compile}: graphs hold their weights")

    def _the_anchor_has_a_base(self):
        full, mode = self.tuning.mode == "full", self.tuning.mode
        if self.anchor is not None and self.anchor.copy_base != full:
            base = "a frozen copy of all weights" if full else "the model without its adapter"
            way_out = f"set anchor.copy_base={str(full).lower()}"
            raise ValueError(f"with tuning.mode={mode} the anchor compares with {base}: {way_out}")
        if self.anchor is not None and full and self.memory.shard:
            raise ValueError("anchor.copy_base=true cannot copy sharded weights: set memory.shard=false, or use LoRA")

    def _one_name_a_metric(self):
        monitors = self.evaluation.monitors if self.evaluation else {}
        for name in {*self.reward, *monitors}:
            taken = name in (*LOGGED, *SCORED) or name.endswith(("_seconds", "_share"))
            if taken or (name in self.reward and name in monitors):
                raise ConfigError(f"{name!r} names two metrics: give the reward or monitor another name")

    def _method_fits_the_rollout(self):
        steps = self.rollout.num_steps
        try:
            if not isinstance(self.method, Unimported):
                draw_plan(self.method, np.linspace(1, 0, steps + 1), np.random.default_rng(0), self.rollout.solver)
        except ValueError as error:
            raise ValueError(f"method {self.method_name} with rollout.num_steps={steps}: {error}") from error

    def _tokens_tile_the_image(self):
        """A token of the known models is 2 x 2 latents of 8 x 8 pixels. Other models are checked when they are read."""
        name, height, width = self.backbone.name, self.rollout.height, self.rollout.width
        if name in KNOWN_MODELS and (height % 16 or width % 16):
            raise ValueError(f"{name} draws images whose sides are multiples of 16 pixels, not {height} x {width}")

    @property
    def evaluation_rollout(self) -> RolloutConfig:
        """The rollout of images that are scored, or drawn by `flowbp sample`; by default on the pipeline's levels."""
        size, options = self.rollout, self.evaluation or EvaluationConfig.model_construct()
        own = {"num_steps": options.num_steps or size.num_steps, "solver": options.solver, "sigmas": options.sigmas}
        return RolloutConfig(height=size.height, width=size.width, **own)

    @property
    def evaluation_guidance(self) -> Guidance:
        """The guidance of those rollouts: that of training, in the interval that the evaluation names."""
        return replace(self.guidance, interval=self.evaluation.interval if self.evaluation else None)

    @property
    def method_name(self) -> str:
        return describe(self.method)["name"]
