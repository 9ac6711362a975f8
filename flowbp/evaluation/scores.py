"""Generate images for prompts and seeds, score them, and compare two sets of weights pair by pair.

The unit of work is a chunk: the same samples are always generated and scored together, because the last bits of a
network's output depend on the batch it runs in. So scores do not depend on how many processes share the chunks, nor on
where an evaluation was interrupted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from flowbp.backbones import Backbone, bind_velocity
from flowbp.config import EvaluationConfig, RolloutConfig
from flowbp.evaluation.statistics import interval, paired_p_value, weighted_mean
from flowbp.guidance import Guidance
from flowbp.image_statistics import IMAGE_STATISTICS, OF_ONE_IMAGE, diversity, thumbnails
from flowbp.rewards import ImageEncoder, Reward
from flowbp.runtime.data import Prompt, load_prompts, sample_seeds
from flowbp.runtime.distributed import process_state
from flowbp.trajectory import rollout

__all__ = [
    "Difference",
    "Samples",
    "Scores",
    "Summary",
    "compare",
    "draw_samples",
    "evaluate",
    "generate",
    "scorers",
    "summarise",
]

Scorer = Callable[
    [Tensor, list[str]], Tensor
]  # (images [B, 3, H, W] in [0, 1], prompts) -> [B], of an embedding [B, d]
Part = dict[
    str, Tensor
]  # the scores of a chunk by metric, [b] float64 each, its "embedding" [b, d], and "images" [m, 3, H, W] uint8
EMBEDDING = "embedding"
BALANCED = "category mean"


@torch.no_grad()
def generate(
    backbone: Backbone, texts: list[str], seeds: Sequence[int], size: RolloutConfig, guidance: Guidance
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of `texts`, one seed each: the same seed gives the same image in any batch, up to
    rounding.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = backbone.noise(size.height, size.width, generators)
    sigmas = backbone.sigmas(size.num_steps, size.height, size.width, size.sigmas)
    return backbone.decode(rollout(bind_velocity(backbone, texts, guidance, size.timesteps), noise, sigmas).sample)


def scorers(
    config: EvaluationConfig, rewards: Mapping[str, Reward], monitors: Mapping[str, Reward], device: str = "cpu"
) -> dict[str, Scorer]:
    """The rewards, the monitors, the checker and the image statistics of a run, by name, in the order in which they are
    reported.

    "embedding" is not a score but what `diversity` is made of, by the first monitor that is an `ImageEncoder`, else the
    first such reward (which training may have learnt to deceive), else in thumbnails.
    """
    named: dict[str, Scorer] = {**rewards, **monitors}
    if config.checker is not None:
        named["checker"] = load_checker(config, device)
    reserved = {"checker", EMBEDDING, *IMAGE_STATISTICS} & {*rewards, *monitors} | (rewards.keys() & monitors.keys())
    if reserved:
        raise ValueError(
            f"a reward or monitor cannot be called {', '.join(sorted(reserved))}: that names another metric; rename it"
        )
    encoders = [scorer.embed for scorer in (*monitors.values(), *rewards.values()) if isinstance(scorer, ImageEncoder)]
    embed = (lambda images, texts: encoders[0](images)) if encoders else thumbnails
    return named | OF_ONE_IMAGE | {EMBEDDING: embed}


def load_checker(config: EvaluationConfig, device: str) -> Scorer:
    """1 for an image that shows what its prompt says, else 0: exactly on `shapes`, by an object detector as GenEval
    does otherwise.

    Raises ValueError for prompts that the checker cannot judge.
    """
    watched = [config.validation_prompts] if config.every is not None and config.validation_prompts is not None else []
    sources = [config.prompts, *watched]
    if config.checker == "shapes":
        from flowbp.shapes.checker import check_batch
        from flowbp.shapes.world import parse

        for prompt in (prompt for source in sources for prompt in load_prompts(source)):
            try:
                parse(prompt.text)
            except ValueError as error:
                raise ValueError(
                    f"evaluation.checker=shapes judges captions of its world alone, others take null: {error}"
                ) from error
        return lambda images, texts: torch.from_numpy(np.asarray(check_batch(images.cpu(), texts), dtype=np.float32))
    from flowbp.evaluation.geneval import load_geneval

    return load_geneval(config.checker, sources, device)


# -- samples and scores
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """What an evaluation draws: prompt i with seed i, in chunks that are generated and scored together. The first
    images are kept.
    """

    prompts: list[Prompt]
    seeds: list[int]
    chunks: list[slice]
    kept_images: int = 0


def draw_samples(prompts: list[Prompt], config: EvaluationConfig, of_each: int = 1) -> Samples:
    """config.samples images, `of_each` prompt in order, and again from the first when they run out; seeds depend on
    config.seed alone.
    """
    count = config.samples
    chosen, seeds = [prompts[i // of_each % len(prompts)] for i in range(count)], sample_seeds(config.seed, count=count)
    return Samples(chosen, seeds, split(count, config.batch_size), config.grid)


def split(count: int, largest: int) -> list[slice]:
    """`count` samples in the fewest chunks of at most `largest`, which differ in size by at most one."""
    parts = np.array_split(np.arange(count), -(-count // largest))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


@dataclass(frozen=True)
class Scores:
    """Scores of n generated images. values: name -> [n] float64. images: the first of them, [m, 3, H, W] uint8."""

    prompts: list[Prompt]
    seeds: list[int]
    values: dict[str, np.ndarray]
    images: Tensor = field(default_factory=lambda: torch.empty(0, 3, 0, 0, dtype=torch.uint8), compare=False)

    def as_csv(self) -> str:
        """A table of one row an image: prompt, category, seed, scores to six digits."""
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["prompt", "category", "seed", *self.values])
        for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            writer.writerow([*prompt, seed, *(f"{column[i]:.6g}" for column in self.values.values())])
        return table.getvalue()

    @classmethod
    def read_csv(cls, path: Path) -> Scores:
        """What `as_csv` wrote: the scores, to six digits, without the images."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        metrics = [name for name in rows[0] if name not in ("prompt", "category", "seed")]
        prompts, seeds = [Prompt(row["prompt"], row["category"]) for row in rows], [int(row["seed"]) for row in rows]
        return cls(prompts, seeds, {name: np.array([float(row[name]) for row in rows]) for name in metrics})


@torch.no_grad()
def score_chunk(
    backbone: Backbone,
    samples: Samples,
    chunk: slice,
    size: RolloutConfig,
    guidance: Guidance,
    named: Mapping[str, Scorer],
) -> Part:
    """Generate and score the samples of one chunk."""
    texts = [prompt.text for prompt in samples.prompts[chunk]]
    images = generate(backbone, texts, samples.seeds[chunk], size, guidance)
    part = {name: scorer(images, texts).cpu() for name, scorer in named.items()}
    part = {name: values if name == EMBEDDING else values.double() for name, values in part.items()}
    kept = images[: max(0, samples.kept_images - chunk.start)]
    return part | {"images": (kept.clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()}


def join(samples: Samples, parts: Sequence[Part]) -> Scores:
    """The scores of all chunks, in their order, and the diversity of prompts with two images or more, where there are
    any.
    """
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images, embeddings = whole.pop("images"), whole.pop(EMBEDDING)
    texts = [prompt.text for prompt in samples.prompts]
    if len(set(texts)) < len(texts):
        whole["diversity"] = diversity(embeddings, texts)
    return Scores(samples.prompts, samples.seeds, {name: column.numpy() for name, column in whole.items()}, images)


def evaluate(
    backbone: Backbone,
    samples: Samples,
    size: RolloutConfig,
    guidance: Guidance,
    named: Mapping[str, Scorer],
    progress: Callable[[int], object] = lambda done: None,
) -> Scores:
    """Score all samples. The processes of a run take chunks in turn, and each gets all scores: they are those of one
    process.

    progress is called with the number of images just scored.
    """
    state, chunks, parts = process_state(), samples.chunks, []
    for first in range(0, len(chunks), state.num_processes):
        own = chunks[
            min(first + state.process_index, len(chunks) - 1)
        ]  # one without a chunk of its own keeps step: weights may be sharded
        parts += gather_object([score_chunk(backbone, samples, own, size, guidance, named)])
        progress(sum(chunk.stop - chunk.start for chunk in chunks[first : first + state.num_processes]))
    return join(samples, parts[: len(chunks)])


# -- summaries
# ---------------------------------------------------------------------------------------------------------------------


def groups(prompts: list[Prompt]) -> dict[str, list[np.ndarray]]:
    """Name -> the sets of samples [n] bool whose means are averaged: all in one, each category; where those differ in
    size, all of them.
    """
    labels = np.array([prompt.category for prompt in prompts])
    names = [name for name in sorted(set(labels)) if name]
    categories = {name: labels == name for name in names if len(names) > 1}
    found = {"all": [np.ones(len(labels), dtype=bool)]} | {name: [members] for name, members in categories.items()}
    if len({members.sum() for members in categories.values()}) > 1:
        found[BALANCED] = list(categories.values())
    return found


@dataclass(frozen=True)
class Summary:
    """A metric over the images of a category that have a finite score, `missing` others: their number, that of their
    different prompts, the mean and its 95 % interval."""

    metric: str
    category: str
    count: int
    missing: int
    prompts: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A metric before and after on the same prompts and seeds: the mean change, its 95 % interval, and p of no change.
    An image whose score is not finite on either side is missing on both."""

    metric: str
    category: str
    count: int
    missing: int
    prompts: int
    before: float
    after: float
    change: float
    low: float
    high: float
    p_value: float


def summarise(scores: Scores) -> list[Summary]:
    """Every metric over all images, then over each category."""
    return [
        Summary(metric, *sizes, weighted_mean(x, weights), *interval(x, weights, texts))
        for metric, values in scores.values.items()
        for sizes, weights, texts, (x,) in scored(scores.prompts, values)
    ]


def compare(before: Scores, after: Scores) -> list[Difference]:
    """Every metric that both sides have, over all samples, then over each category. Raises ValueError unless prompts
    and seeds agree.
    """
    if (before.prompts, before.seeds) != (after.prompts, after.seeds):
        raise ValueError("a paired comparison needs the same prompts and seeds on both sides")
    differences = []
    for metric in (name for name in before.values if name in after.values):
        for sizes, weights, texts, (old, new) in scored(before.prompts, before.values[metric], after.values[metric]):
            means = weighted_mean(old, weights), weighted_mean(new, weights)
            estimate = (
                weighted_mean(new - old, weights),
                *interval(new - old, weights, texts),
                paired_p_value(old, new, weights, texts),
            )
            differences.append(Difference(metric, *sizes, *means, *estimate))
    return differences


def scored(
    prompts: list[Prompt], *columns: np.ndarray
) -> Iterator[tuple[tuple[str, int, int, int], np.ndarray, list[str], np.ndarray]]:
    """((category, count, missing, prompts), weights [m], texts, scores [K, m]) of each group, of its m samples that are
    finite in all K `columns` [n]. weights: 1 / (size of the sample's set)."""
    table = np.stack(columns)
    finite = np.isfinite(table).all(axis=0)
    for category, sets in groups(prompts).items():
        weights = sum((members & finite) / max(1, (members & finite).sum()) for members in sets)
        rows = np.flatnonzero(weights)
        texts = [prompts[i].text for i in rows]
        missing = sum(int((members & ~finite).sum()) for members in sets)
        yield (category, len(rows), missing, len(set(texts))), weights[rows], texts, table[:, rows]
