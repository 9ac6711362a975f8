"""Everything that a run's config may say: types, defaults, bounds and what must fit together. Unknown keys are
errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    model_validator,
)

from flowbp.config.registry import FINITE, ConfigError, build_method, describe, from_mapping, unknown
from flowbp.guidance import Guidance
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.methods import METHODS
from flowbp.objective import Objective
from flowbp.rewards import Reward, RunningScale, Smoothing, Term, check_options, load_reward

LOGGED = (
    "step nodes images loss grad_norm sample_grad_norm d_j d_0 kept skipped lr seconds peak_mb".split()
)  # columns of metrics.jsonl
SCORED = ["prompt", "category", "seed", "checker", "embedding", *IMAGE_STATISTICS]  # columns of an evaluation

MethodField = Annotated[Any, BeforeValidator(build_method), PlainSerializer(lambda method: describe(method, METHODS))]

# -- kinds of values; numbers are finite wherever they stand
# -------------------------------------------------------------------------


def no_switch(value: Any) -> Any:
    """YAML reads yes, no, on and off as booleans, which would pass for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got the switch {str(value).lower()}")
    return value


def known_backend(name: str) -> str:
    known = torch.compiler.list_backends(exclude_tags=None)
    if name not in known:
        raise unknown("compile backend", name, known)
    return name


Number = BeforeValidator(no_switch)
Count = Annotated[int, Number, Field(ge=1)]
Seed = Annotated[int, Number, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Number, Field(ge=8, multiple_of=8)]
Real = Annotated[float, Number]
Positive = Annotated[float, Number, Field(gt=0)]
NonNegative = Annotated[float, Number, Field(ge=0)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Decay = Annotated[float, Number, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
MetricName = Annotated[str, Field(pattern=r"^\w[\w .-]*$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]

# -- the run
# --------------------------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True) | FINITE

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                raise unknown("key", key, cls.model_fields)
        return values


class BackboneConfig(Strict):
    name: Text = Field(description='"shapes", a known model, a local diffusers folder or a Hub id')
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    precision: Literal["pipeline", "float32"] = Field("float32", description="of the latents between network calls")
    max_sequence_length: Count | None = Field(
        None, description="tokens of the prompt embedding; null means the pipeline's default"
    )


Levels = Literal["published", "pipeline"]


class RolloutConfig(Strict):
    num_steps: Count = 25
    height: Pixels = 512
    width: Pixels = 512
    sigmas: Levels = Field(
        "published",
        description="published: linspace(1, 1/N, N) under the pipeline's shift; pipeline: its sampler's noise levels",
    )
    timesteps: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype of the time 1000 sigma that the network reads; the released SD3.5 code has bfloat16",
    )


class ScorerConfig(Strict):
    """A reward model and where its weights are."""

    name: Text = Field("clip", description="one of `flowbp rewards`, or a function of your own as module:function")
    model: Text | None = Field(
        None, description='a local folder, a Hub id, "shapes" or "shapes-monitor"; null means the published one'
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the weights; null means the reward's own"
    )
    revision: Text | None = Field(None, description="commit of a Hub checkpoint")
    sha256: Sha256 | None = Field(None, description="digest of the checkpoint file")

    @model_validator(mode="after")
    def _options_fit(self):
        check_options(self.name, self.model, self.dtype, self.revision, self.sha256)
        return self

    def load(self, device: str = "cpu") -> Reward:
        return load_reward(self.name, self.model, device, self.dtype, self.revision, self.sha256)


class RewardConfig(ScorerConfig):
    """A reward to train on, and its part in the loss. Several are a mapping from names of your choice to such specs."""

    weight: Positive = 1.0
    hinge: Real | None = Field(
        None, description="target in the reward's own units; no gradient from there on; null means no target"
    )
    normalise: bool = Field(False, description="divide the loss by the running deviation of the reward")
    smooth: Annotated[Smoothing | None, from_mapping(Smoothing)] = None

    def term(self, device: str = "cpu", reward: Reward | None = None) -> Term:
        """The reward, loaded unless it is given, with its part in the loss."""
        scale = RunningScale() if self.normalise else None
        return Term(reward or self.load(device), Objective(self.hinge), self.weight, self.smooth, scale)


def is_one_reward(spec: Mapping[str, Any]) -> bool:
    """Whether `spec` holds the fields of one reward; if not, it maps names to several, each a mapping itself."""
    return any(key in RewardConfig.model_fields or not isinstance(value, Mapping) for key, value in spec.items())


def by_name(rewards: Any) -> Any:
    """One reward is short for {"reward": it}."""
    return {"reward": rewards} if isinstance(rewards, Mapping) and is_one_reward(rewards) else rewards


def without_nulls(monitors: Any) -> Any:
    """A monitor that is null is one that a preset has and this run leaves out; null in place of all leaves out all."""
    if monitors is None:
        return {}
    return (
        {name: spec for name, spec in monitors.items() if spec is not None}
        if isinstance(monitors, Mapping)
        else monitors
    )


def shortest(rewards: dict[str, RewardConfig]) -> Any:
    """The inverse of `by_name`."""
    dumped = {name: reward.model_dump(mode="json") for name, reward in rewards.items()}
    return dumped["reward"] if dumped.keys() == {"reward"} else dumped


RewardsField = Annotated[
    dict[MetricName, RewardConfig], Field(min_length=1), BeforeValidator(by_name), PlainSerializer(shortest)
]


class DataConfig(Strict):
    prompts: Text = Field(description='a text file, one prompt a line, or "shapes:train"')
    batch_size: Count = 8
    accumulate: Count = Field(1, description="micro-batches an optimizer step")
    embeddings: Literal["cached", "live"] = Field(
        "cached",
        description="cached: embed all prompts once, to disk, and release the text encoders; live: encode every batch",
    )
    cache: Path | None = Field(
        None, description="folder of cached embeddings; null means $FLOWBP_CACHE, else ~/.cache/flowbp"
    )


class MemoryConfig(Strict):
    """Where the memory of a step goes, and what it buys in time. Only vae_tiling changes the gradient: its seams are
    blended.
    """

    recompute: Literal["always", "never", "auto"] = Field(
        "always", description="replay active nodes, keep their graphs, or keep what fits"
    )
    budget_gb: NonNegative | None = Field(
        None, description="recompute: auto only: 1e9 bytes for kept graphs; null measures what is free"
    )
    nodes_per_forward: Count = Field(1, description="active nodes replayed in one batched forward pass")
    reward_batch: Count | None = Field(
        None, description="samples decoded and scored at a time; null takes the whole batch"
    )
    checkpointing: bool = Field(
        False, description="keep the inputs of the transformer's blocks alone and run them again in backward"
    )
    vae_checkpointing: bool = Field(False, description="the same in the VAE's decoder")
    vae_slicing: bool = Field(
        False, description="decode one image at a time; saves memory together with vae_checkpointing"
    )
    vae_tiling: bool = Field(
        False, description="decode images above the VAE's own sample size in overlapping tiles, blended"
    )
    shard: bool = Field(
        False, description="several processes: split the weights over them (FSDP2) instead of copying them"
    )
    shard_gradients: bool = Field(
        False, description="with shard: reduce and split gradients after every backward pass, not once a step"
    )

    @model_validator(mode="after")
    def _gradients_follow_weights(self):
        if self.shard_gradients and not self.shard:
            raise ValueError("shard_gradients=true needs shard=true: gradients are split as the weights are")
        return self

    @model_validator(mode="after")
    def _budget_is_for_auto(self):
        if self.budget_gb is not None and self.recompute != "auto":
            raise ValueError(
                f"budget_gb={self.budget_gb} needs recompute=auto, not {self.recompute}: it says how many graphs auto "
                "keeps"
            )
        return self


class TuningConfig(Strict):
    mode: Literal["lora", "full"] = "lora"
    rank: Count = Field(16, description="of the LoRA matrices")
    alpha: Positive | None = Field(None, description="LoRA scale numerator; null means equal to rank")
    dropout: Decay = Field(0.0, description="of the LoRA branches' inputs; replays draw the rollout's masks again")
    targets: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="module names; null means the backbone's default"
    )
    master_weights: bool = Field(
        True, description="keep float32 copies for the optimizer of trained weights that are narrower"
    )

    @model_validator(mode="after")
    def _lora_settings_are_for_lora(self):
        given = {"alpha": self.alpha, "dropout": self.dropout or None, "targets": self.targets}
        for key, value in given.items():
            if self.mode == "full" and value is not None:
                raise ValueError(
                    f"{key}={value} is a setting of LoRA: leave it out, as mode=full trains all weights, or use "
                    "mode=lora"
                )
        return self


class OptimizerConfig(Strict):
    name: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs bitsandbytes and a GPU")
    lr: Positive = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-4
    warmup: Annotated[int, Number, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    max_grad_norm: Positive = 1.0
    max_sample_grad_norm: Positive | None = Field(
        None, description="clip each sample's reward gradient at the reward input"
    )


class GenEvalConfig(Strict):
    """GenEval's judgement of `evaluation.prompts`, which must then be its evaluation_metadata.jsonl. The thresholds are
    those it uses with Mask2Former; a detector with scores of another kind needs its own."""

    detector: Text = Field(description="a local folder or Hub id: OWLv2, Grounding DINO, Mask2Former, DETR, ...")
    colours: Text = Field(
        description="a local folder or Hub id of a CLIP model; GenEval: openai/clip-vit-large-patch14"
    )
    threshold: Share = Field(0.3, description="least score of a detection")
    counting_threshold: Share = Field(0.9, description="the same for prompts with the tag 'counting'")


CheckerField = Annotated[
    Annotated[Literal["shapes"], Tag("shapes")] | Annotated[GenEvalConfig, Tag("geneval")],
    Discriminator(lambda spec: "shapes" if isinstance(spec, str) else "geneval"),
]


class EvaluationConfig(Strict):
    prompts: Text
    samples: Count = 256
    batch_size: Count = 64
    seed: Seed = 1234
    num_steps: Count | None = Field(
        None, description="rollout steps of the images that are scored; null means as in training"
    )
    sigmas: Levels = Field(
        "pipeline", description="their noise levels, as in rollout.sigmas; those of training are not taken over"
    )
    monitors: Annotated[dict[MetricName, ScorerConfig], BeforeValidator(without_nulls)] = Field(
        default_factory=dict, description="scored, never trained on; null takes away one of a preset, or all"
    )
    watch: bool = Field(
        True, description="score the images of every training step by the monitors; false loads them to evaluate only"
    )
    checker: CheckerField | None = None
    grid: Count = Field(16, description="images in the before/after grids")
    every: Count | None = Field(None, description="steps between evaluations during training; null makes none")
    validation_prompts: Text | None = Field(
        None, description="prompts of those; null means `prompts`, which then chose the best step"
    )
    validation_samples: int = Field(96, ge=2)
    best: str | None = Field(
        None, description="held-out metric, a monitor or checker, by which the best step's weights are kept"
    )
    patience: Count | None = Field(None, description="stop after so many evaluations without a new best step")

    def load_monitors(self, device: str = "cpu") -> dict[str, Reward]:
        return {name: spec.load(device) for name, spec in self.monitors.items()}

    @model_validator(mode="after")
    def _best_is_held_out(self):
        held_out = [*self.monitors, *(["checker"] if self.checker is not None else [])]
        if self.best is not None and self.best not in held_out:
            raise unknown("held-out metric for evaluation.best", self.best, held_out)
        if self.best is not None and self.every is None:
            raise ValueError(f"best={self.best} needs every: the steps between evaluations during training")
        if self.validation_prompts is not None and self.every is None:
            raise ValueError(
                f"validation_prompts={self.validation_prompts} needs every: the steps between evaluations during "
                "training"
            )
        if self.patience is not None and self.best is None:
            raise ValueError(f"patience={self.patience} needs best: the held-out metric that must improve")
        return self


class RunConfig(Strict):
    """Everything a run needs; a resolved copy is written beside its results."""

    output: Path
    seed: Seed = 42
    steps: Count = 300
    checkpoint_every: Count = 100
    backbone: BackboneConfig
    rollout: RolloutConfig = RolloutConfig()
    guidance: Annotated[Guidance, from_mapping(Guidance)] = Guidance()
    method: MethodField
    plans: Literal["shared", "per_batch", "per_sample", "stratified"] = Field(
        "shared",
        description="one plan an optimizer step, as published; one a micro-batch; one a sample; "
        "or one a sample that together cover the trajectory",
    )
    reward: RewardsField
    data: DataConfig
    memory: MemoryConfig = MemoryConfig()
    compile: Annotated[str, AfterValidator(known_backend)] | None = Field(
        None, description="torch.compile backend for the transformer's blocks, such as inductor; null runs eagerly"
    )
    tuning: TuningConfig = TuningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[float, Number, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of the moving average of the weights"
    )
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _plans_fit(self):
        needs = {"memory.recompute": (self.memory.recompute, "always"), "tuning.dropout": (self.tuning.dropout, 0.0)}
        for key, (value, needed) in needs.items():
            if self.plans in ("per_sample", "stratified") and value != needed:
                raise ValueError(
                    f"plans={self.plans} needs {key}={needed}, not {value}: samples replay their own nodes; or "
                    "plans=shared"
                )
        if self.tuning.dropout and self.memory.nodes_per_forward > 1:
            raise ValueError(
                f"tuning.dropout={self.tuning.dropout} needs memory.nodes_per_forward=1: masks are drawn again node by "
                "node"
            )
        return self

    @model_validator(mode="after")
    def _one_name_a_metric(self):
        watched = self.evaluation.monitors if self.evaluation else {}
        for name in {*self.reward, *watched}:
            if (name in self.reward and name in watched) or name in (*LOGGED, *SCORED) or name.endswith("_seconds"):
                raise ConfigError(f"{name!r} names two metrics: give the reward or monitor another name")
        return self

    @model_validator(mode="after")
    def _method_fits_the_rollout(self):
        sigmas = np.linspace(1, 0, self.rollout.num_steps + 1)
        try:
            self.method.plan(sigmas, np.random.default_rng(0))
        except ValueError as error:
            raise ValueError(
                f"method {self.method_name} with rollout.num_steps={self.rollout.num_steps}: {error}"
            ) from error
        return self

    @model_validator(mode="after")
    def _tokens_tile_the_image(self):
        """Of published models, 2 latents to a token and 8 pixels to a latent. What another folder asks for is known
        once it is read.
        """
        height, width = self.rollout.height, self.rollout.width
        if height % 16 or width % 16:
            from flowbp.backbones import KNOWN_MODELS  # imports diffusers

            if self.backbone.name in KNOWN_MODELS:
                raise ValueError(
                    f"{self.backbone.name} draws images whose sides are multiples of 16 pixels, not {height} x {width}"
                )
        return self

    @property
    def evaluation_rollout(self) -> RolloutConfig:
        """The rollout of the images that are scored, or drawn by `flowbp sample`: on the pipeline's own noise levels by
        default.
        """
        size, options = self.rollout, self.evaluation
        num_steps, sigmas = (options.num_steps, options.sigmas) if options else (None, "pipeline")
        return RolloutConfig(num_steps=num_steps or size.num_steps, height=size.height, width=size.width, sigmas=sigmas)

    @property
    def method_name(self) -> str:
        return describe(self.method, METHODS)["name"]
