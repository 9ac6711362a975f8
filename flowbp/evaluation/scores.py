"""Generate images for prompts and seeds, score them, and compare two sets of weights pair by pair.

The unit of work is a chunk: the same samples are always generated and scored together, because the last bits of a
network's output depend on the batch that it runs in. Scores therefore depend neither on the number of processes that
share the chunks nor on where an evaluation was interrupted.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from flowbp.config.schema import EvaluationConfig, RolloutConfig, RunConfig
from flowbp.evaluation.statistics import interval, paired_p_value, weighted_mean
from flowbp.given import cut, find
from flowbp.guidance import Guidance
from flowbp.image_statistics import OF_ONE_IMAGE, diversity, thumbnails
from flowbp.rewards import ImageEncoder, Reward
from flowbp.runtime.console import Progress
from flowbp.runtime.data import Prompt, load_prompts, sample_seeds
from flowbp.runtime.distributed import process_state

if TYPE_CHECKING:  # importing it takes seconds, and whoever checks a command's input does without
    from flowbp.backbones.base import Backbone
    from flowbp.runtime.tuned_model import TunedModel

# (images [B, 3, H, W] in [0, 1], prompts) -> scores [B], or embeddings [B, d]
Scorer = Callable[[Tensor, list[str]], Tensor]
Scorers = Mapping[str, Scorer]
# What a chunk of b samples gave: metric -> [b] float64; "embedding" -> [b, d]; "images" -> [m, 3, H, W] uint8
Part = dict[str, Tensor]
Row = dict[str, Any]  # of a table of means (`summarise`) or of changes (`compare`)
EMBEDDING, BALANCED = "embedding", "category mean"
COLUMNS = ("prompt", "category", "seed")  # of a table of scores, before the metrics
# Loaders of checkers by name. A loader takes all texts that will be judged, and returns a scorer of 0 and 1.
CHECKERS = {"shapes": "flowbp.shapes.checker:load_checker"}


@torch.no_grad()
def generate(
    backbone: "Backbone", texts: list[str], seeds: Sequence[int], sampling: RolloutConfig, guidance: Guidance
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of `texts`, one seed each.

    The same seed gives the same image in any batch, up to rounding.
    """
    from flowbp.backbones.base import bind_velocity
    from flowbp.trajectory import rollout

    height, width = sampling.height, sampling.width
    noise = backbone.noise(height, width, [torch.Generator().manual_seed(seed) for seed in seeds])
    sigmas = backbone.sigmas(sampling.num_steps, height, width, sampling.sigmas)
    velocity = bind_velocity(backbone, texts, guidance, sampling.timesteps)
    return backbone.decode(rollout(velocity, noise, sigmas, solver=sampling.solver).sample)


def scorers(
    config: EvaluationConfig, rewards: Mapping[str, Reward], monitors: Mapping[str, Reward], device: str = "cpu"
) -> dict[str, Scorer]:
    """The rewards, monitors, checker and image statistics of a run by name, in the order in which they are reported.

    One more entry, "embedding", is no score: `diversity` compares these vectors. They come from the first monitor that
    is an `ImageEncoder`. If there is none, they come from the first such reward (which training may have learnt to
    deceive), and else they are thumbnails.
    """
    named: dict[str, Scorer] = {**rewards, **monitors}
    if config.checker is not None:
        named["checker"] = load_checker(config, device)
    encoders = [scorer.embed for scorer in (*monitors.values(), *rewards.values()) if isinstance(scorer, ImageEncoder)]
    embed = (lambda images, texts: encoders[0](images)) if encoders else thumbnails
    return named | OF_ONE_IMAGE | {EMBEDDING: embed}


def load_checker(config: EvaluationConfig, device: str) -> Scorer:
    """The scorer that gives 1 to an image that shows what its prompt says, else 0.

    config.checker is a name of `CHECKERS`, a loader's "module:function", or describes the object detector of GenEval.
    Raises ValueError for prompts that the checker cannot judge.
    """
    sources = [source for source in (config.prompts, config.validation_prompts) if source is not None]
    if isinstance(config.checker, str):
        load = find("checker", CHECKERS.get(config.checker, config.checker))
        return load([prompt.text for source in sources for prompt in load_prompts(source)])
    from flowbp.evaluation.geneval import load_geneval

    return load_geneval(config.checker, sources, device)


# -- samples and scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """What an evaluation draws: prompt i with seed i, in chunks that are generated and scored together.

    kept_images: so many images, from the first on, are kept with their scores.
    """

    prompts: list[Prompt]
    seeds: list[int]
    chunks: list[slice]
    kept_images: int = 0


def draw_samples(prompts: list[Prompt], config: EvaluationConfig, of_each: int = 1) -> Samples:
    """config.samples samples: `of_each` of every prompt in order, and again from the first when the prompts run out.

    Seeds depend on config.seed alone.
    """
    count = config.samples
    chosen, seeds = [prompts[i // of_each % len(prompts)] for i in range(count)], sample_seeds(config.seed, count=count)
    return Samples(chosen, seeds, split(count, config.batch_size), config.grid)


def split(count: int, largest: int) -> list[slice]:
    """`count` samples in the fewest chunks of at most `largest`, which differ in length by at most one."""
    parts = np.array_split(np.arange(count), -(-count // largest))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def length(chunk: slice) -> int:
    return chunk.stop - chunk.start


@dataclass(frozen=True)
class Scores:
    """Scores of n generated images. values: name -> [n] float64. images: the first of them, [m, 3, H, W] uint8."""

    prompts: list[Prompt]
    seeds: list[int]
    values: dict[str, np.ndarray]
    images: Tensor = field(default_factory=lambda: torch.empty(0, 3, 0, 0, dtype=torch.uint8), compare=False)

    def same_samples(self, other: "Scores") -> bool:
        return (self.prompts, self.seeds) == (other.prompts, other.seeds)

    def as_csv(self, number_format: str = ".6g", line_end: str = "\r\n") -> str:
        """A table of one row an image: prompt, category, seed, scores. An empty format keeps all digits."""
        table, columns = io.StringIO(), [column.tolist() for column in self.values.values()]
        writer = csv.writer(table, lineterminator=line_end)
        writer.writerow([*COLUMNS, *self.values])
        for prompt, seed, *numbers in zip(self.prompts, self.seeds, *columns, strict=True):
            writer.writerow([*prompt, seed, *(f"{number:{number_format}}" for number in numbers)])
        return table.getvalue()

    @classmethod
    def read_csv(cls, path: Path) -> "Scores":
        """What `as_csv` wrote: the scores, to its digits, without the images. Raises ValueError for a table that is cut
        off or has other columns.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            values = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name not in COLUMNS}
            prompts = [Prompt(row["prompt"], row["category"]) for row in rows]
            return cls(prompts, [int(row["seed"]) for row in rows], values)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole table of scores ({cut(error)}): move it away, then compare") from None


@torch.no_grad()
def score_chunk(backbone: "Backbone", samples: Samples, config: RunConfig, named: Scorers, chunk: slice) -> Part:
    """Generate the samples of one chunk as the evaluations of `config` do, and score them."""
    texts = [prompt.text for prompt in samples.prompts[chunk]]
    sampling = config.evaluation_rollout, config.evaluation_guidance
    images = generate(backbone, texts, samples.seeds[chunk], *sampling)
    part = {name: scorer(images, texts).cpu() for name, scorer in named.items()}
    part = {name: values if name == EMBEDDING else values.double() for name, values in part.items()}
    kept = images[: max(0, samples.kept_images - chunk.start)]
    return part | {"images": (kept.clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()}


def join(samples: Samples, parts: Sequence[Part]) -> Scores:
    """The scores of all chunks in their order, with the diversity of the prompts that have two images or more, if any
    has.
    """
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images, embeddings = whole.pop("images"), whole.pop(EMBEDDING)
    texts = [prompt.text for prompt in samples.prompts]
    if len(set(texts)) < len(texts):
        whole["diversity"] = diversity(embeddings, texts)
    return Scores(samples.prompts, samples.seeds, {name: column.numpy() for name, column in whole.items()}, images)


def evaluate(samples: Samples, score: Callable[[slice], Part], progress: Progress) -> Scores:
    """Score all samples, whose chunks `score` scores one by one. The processes of a run take chunks in turn, and each
    gets the scores that one process alone would get.

    progress is called with the number of images just scored.
    """
    state, chunks, parts = process_state(), samples.chunks, []
    for first in range(0, len(chunks), state.num_processes):
        # A process without a chunk of its own repeats the last one: sharded weights need all processes in every pass.
        own = chunks[min(first + state.process_index, len(chunks) - 1)]
        parts += gather_object([score(own)])
        progress(sum(map(length, chunks[first : first + state.num_processes])))
    return join(samples, parts[: len(chunks)])


class Evaluator:
    """Scores any weights of a model on the samples of `config.evaluation`, or on others.

    Monitors and checker are loaded at the start, so that a missing one is an error before training. With
    `evaluation.watch` they stay in memory. Without it they are released, and loaded again for each evaluation.
    """

    def __init__(self, config: RunConfig, rewards: Mapping[str, Reward], device: str):
        """rewards: those that are trained on."""
        self.config, self.rewards, self.device = config, rewards, device
        options = config.evaluation
        self.samples = draw_samples(load_prompts(options.prompts), options)
        place = device if options.watch else "cpu"
        monitors = options.load_monitors(place)
        loaded = scorers(options, rewards, monitors, place)
        self.monitors, self._scorers = (monitors, loaded) if options.watch else ({}, None)

    def score(
        self, model: "TunedModel", weights: Mapping[str, Tensor], samples: Samples, progress: Progress = lambda _: None
    ) -> Scores:
        """Scores of images drawn with `weights`. The processes share the work and all get all scores."""
        named = self._scorers or self.load()
        with model.using(weights) as backbone, model.ranks.gathering():
            return evaluate(samples, partial(score_chunk, backbone, samples, self.config, named), progress)

    def load(self) -> dict[str, Scorer]:
        """Rewards, monitors, checker and image statistics by name."""
        options = self.config.evaluation
        return scorers(options, self.rewards, self.monitors or options.load_monitors(self.device), self.device)


# -- summaries ---------------------------------------------------------------------------------------------------------


def summarise(scores: Scores) -> list[Row]:
    """Every metric over all images, then over each category: the mean with the ends of its 95 % interval.

    A row has metric, category, count (of the finite scores), missing (of the others), prompts (different ones among
    those counted), mean, low and high.
    """
    rows = []
    for metric, values in scores.values.items():
        for row, (column,), weights, texts in finite_groups(metric, scores.prompts, values):
            mean = {"mean": weighted_mean(column, weights)}
            rows.append(row | mean | ends_of_interval(column, weights, texts))
    return rows


def compare(before: Scores, after: Scores) -> list[Row]:
    """Every metric that both sides have, over all samples, then over each category: its mean before and after, the mean
    change with the ends of its 95 % interval, and the p value of no change.

    Of the fields of `summarise`, a row has "before", "after", "change" and "p_value" in place of the mean. A sample
    counts if its score is finite on both sides. Raises ValueError unless prompts and seeds agree.
    """
    if not before.same_samples(after):
        raise ValueError("a paired comparison needs the same prompts and seeds on both sides")
    rows = []
    for metric in (name for name in before.values if name in after.values):
        columns = before.values[metric], after.values[metric]
        for row, (old, new), weights, texts in finite_groups(metric, before.prompts, *columns):
            parts = {"before": old, "after": new, "change": new - old}
            means = {name: weighted_mean(part, weights) for name, part in parts.items()}
            p_value = {"p_value": paired_p_value(old, new, weights, texts)}
            rows.append(row | means | ends_of_interval(new - old, weights, texts) | p_value)
    return rows


def means_and_changes(who: str, scores: Mapping[str, Scores], first: str, others: Iterable[str]) -> dict[str, Any]:
    """{"means": the rows of all scores by name, "changes": those of `others`, each paired with `first`}. The key `who`
    of a row says whose it is.
    """
    pairs = {name: compare(scores[first], scores[name]) for name in others}
    return {
        "means": [{who: name} | row for name, own in scores.items() for row in summarise(own)],
        "changes": [{who: name, "against": first} | row for name, rows in pairs.items() for row in rows],
    }


def ends_of_interval(values: np.ndarray, weights: np.ndarray, texts: list[str]) -> dict[str, float]:
    """{"low", "high"} of the mean of values [m]."""
    return dict(zip(("low", "high"), interval(values, weights, texts), strict=True))


def finite_groups(metric: str, prompts: list[Prompt], *columns: np.ndarray) -> Iterator[tuple]:
    """The samples that are finite in all K `columns` [n]: those of all prompts, then those of each category.

    Yields (what they are, as a row begins; their scores [K, m]; their weights [m] in a mean; the texts of their m
    prompts).
    """
    table = np.stack(columns)
    finite = np.isfinite(table).all(axis=0)
    for category, sets in averaged_sets(prompts).items():
        weights = sum((members & finite) / max(1, (members & finite).sum()) for members in sets)
        missing = sum(int((members & ~finite).sum()) for members in sets)
        rows = np.flatnonzero(weights)
        texts = [prompts[i].text for i in rows]
        about = {"category": category, "count": len(rows), "missing": missing, "prompts": len(set(texts))}
        yield {"metric": metric} | about, table[:, rows], weights[rows], texts


def averaged_sets(prompts: list[Prompt]) -> dict[str, list[np.ndarray]]:
    """Name -> sets of samples, each a mask [n]: the mean under a name is the average of the means of its sets.

    "all" has one set of all samples, and each category has one set. Where categories differ in size, `BALANCED` has
    every category as a set, so that each counts alike.
    """
    labels = np.array([prompt.category for prompt in prompts])
    names = [name for name in sorted(set(labels)) if name]
    categories = {name: labels == name for name in names if len(names) > 1}
    sets = {"all": [np.ones(len(labels), dtype=bool)]} | {name: [members] for name, members in categories.items()}
    uneven = len({members.sum() for members in categories.values()}) > 1
    return sets | ({BALANCED: list(categories.values())} if uneven else {})
