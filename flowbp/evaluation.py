"""Generate images for prompts and seeds, score them, and compare two sets of weights pair by pair."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowbp.backbones import Backbone, bind_velocity
from flowbp.config import EvaluationConfig, RolloutConfig
from flowbp.data import Prompt, sample_seeds
from flowbp.guidance import Guidance
from flowbp.rewards import Reward
from flowbp.trajectory import rollout

__all__ = ["Difference", "Scores", "compare", "evaluate", "first_images", "generate", "scorers", "summarise"]

Scorer = Callable[[Tensor, list[str]], Tensor]  # (images [B, 3, H, W] in [0, 1], prompts) -> [B]


@torch.no_grad()
def generate(backbone: Backbone, texts: list[str], seeds: Sequence[int], size: RolloutConfig, guidance: Guidance) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of `texts`, one seed each: the same seed gives the same image in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = backbone.noise(size.height, size.width, generators)
    sigmas = backbone.sigmas(size.num_steps, size.height, size.width)
    return backbone.decode(rollout(bind_velocity(backbone, texts, guidance), noise, sigmas).sample)


def scorers(rewards: dict[str, Reward], monitors: dict[str, Reward], checker: str | None) -> dict[str, Scorer]:
    """The rewards, the monitors and the checker of a run, by name, in the order in which they are reported."""
    named: dict[str, Scorer] = {**rewards, **monitors}
    if checker == "shapes":
        from flowbp.shapes.checker import check_batch

        named["checker"] = lambda images, texts: torch.from_numpy(np.asarray(check_batch(images.cpu(), texts), dtype=np.float32))
    return named


@dataclass(frozen=True)
class Scores:
    """Scores of n generated images. values: name -> [n] float64."""

    prompts: list[Prompt]
    seeds: list[int]
    values: dict[str, np.ndarray]

    def write_csv(self, path: Path) -> None:
        """One row an image: prompt, category, seed, scores."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "category", "seed", *self.values])
            for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
                writer.writerow([*prompt, seed, *(f"{column[i]:.6g}" for column in self.values.values())])


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    prompts: list[Prompt],
    config: EvaluationConfig,
    size: RolloutConfig,
    guidance: Guidance,
    named: dict[str, Scorer],
    progress: Callable[[int], object] = lambda done: None,
) -> Scores:
    """Score config.samples images; prompts are taken in order, and again from the first when they run out.

    Seeds depend on config.seed alone. progress is called with the number of images just scored.
    """
    chosen = [prompts[i % len(prompts)] for i in range(config.samples)]
    seeds = sample_seeds(config.seed, count=config.samples)
    values: dict[str, list[Tensor]] = {name: [] for name in named}
    for first in range(0, config.samples, config.batch_size):
        part = slice(first, min(first + config.batch_size, config.samples))
        texts = [prompt.text for prompt in chosen[part]]
        images = generate(backbone, texts, seeds[part], size, guidance)
        for name, scorer in named.items():
            values[name].append(scorer(images, texts).double().cpu())
        progress(len(texts))
    return Scores(chosen, seeds, {name: torch.cat(parts).numpy() for name, parts in values.items()})


def first_images(backbone: Backbone, prompts: list[Prompt], config: EvaluationConfig, size: RolloutConfig, guidance: Guidance) -> Tensor:
    """The first config.grid images that `evaluate` scores, [grid, 3, H, W]."""
    count = min(config.grid, config.samples)
    texts = [prompts[i % len(prompts)].text for i in range(count)]
    return generate(backbone, texts, sample_seeds(config.seed, count=count), size, guidance)


def over_categories(prompts: list[Prompt]) -> list[tuple[str, np.ndarray]]:
    """("all", every row) and then (category, its rows) for each category, if there are several."""
    labels = np.array([prompt.category for prompt in prompts])
    names = sorted(set(labels) - {""})
    return [("all", np.ones(len(labels), dtype=bool))] + [(name, labels == name) for name in names if len(names) > 1]


def summarise(scores: Scores) -> list[tuple[str, str, int, float]]:
    """(metric, category, number of images, mean) over all images, then over each category."""
    groups = over_categories(scores.prompts)
    return [(metric, name, int(rows.sum()), float(v[rows].mean())) for metric, v in scores.values.items() for name, rows in groups]


@dataclass(frozen=True)
class Difference:
    """A metric before and after on the same prompts and seeds; `half_width` is that of the paired 95 % interval of the mean difference."""

    metric: str
    category: str
    before: float
    after: float
    half_width: float
    count: int

    @property
    def mean(self) -> float:
        return self.after - self.before


def compare(before: Scores, after: Scores) -> list[Difference]:
    """Every metric over all samples, then over each category. Paired: half width 1.96 times the standard error of the differences."""
    if (before.prompts, before.seeds) != (after.prompts, after.seeds):
        raise ValueError("a paired comparison needs the same prompts and seeds on both sides")
    differences = []
    for metric in before.values:
        for category, rows in over_categories(before.prompts):
            old, new = before.values[metric][rows], after.values[metric][rows]
            error = (new - old).std(ddof=1) / np.sqrt(len(old)) if len(old) > 1 else float("nan")
            differences.append(Difference(metric, category, float(old.mean()), float(new.mean()), float(1.96 * error), len(old)))
    return differences
