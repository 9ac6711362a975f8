"""The over-optimisation sentinel: held-out metrics at regular steps of training, the best step, and when to stop.

Whatever reward is maximised, its true aim first improves with it and then falls (Gao et al. 2023, arXiv 2210.10760). So
the same held-out prompts and seeds are scored every `evaluation.every` steps. All decisions are functions of these
scores: a run that goes on from a checkpoint decides as an unbroken one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowbp.config.schema import EvaluationConfig
from flowbp.evaluation.scores import Row, Samples, Scores, compare, draw_samples
from flowbp.evaluation.templates import METRICS, words
from flowbp.runtime.data import load_prompts

History = Mapping[int, Scores]  # by optimizer steps taken, increasing; all of the same samples
Past = Mapping[int, Mapping[str, np.ndarray]]  # the same as plain columns by metric, as a run's folder keeps them


class Sentinel:
    """The history of a run's periodic evaluations, and what follows from it. It writes nothing, and reads the
    prompts alone.
    """

    def __init__(self, config: EvaluationConfig, trained: Iterable[str], past: Past | None = None):
        """trained: names of the rewards that training maximises. past: scores by step, of a run that goes on."""
        self.config, self.trained, self.samples = config, tuple(trained), validation_samples(config)
        self.history: dict[int, Scores] = {}
        for step, values in sorted((past or {}).items()):
            self.record(step, Scores(self.samples.prompts, self.samples.seeds, dict(values)))

    def due(self, step: int) -> bool:
        """Whether the weights after `step` optimizer steps must be scored, and were not yet."""
        return step % self.config.every == 0 and step not in self.history

    def record(self, step: int, scores: Scores) -> bool:
        """Add the scores of the weights after `step` steps, by name in the order that a resumed run reads them in.

        Returns whether these weights are the best so far.
        """
        self.history[step] = replace(scores, values=dict(sorted(scores.values.items())))
        return self.best == step

    @property
    def best(self) -> int | None:
        """The best step by `evaluation.best`, if there is one."""
        return best_step(self.history, self.config.best) if self.config.best and self.history else None

    @property
    def stops(self) -> bool:
        """Whether `evaluation.patience` evaluations have passed without a new best step."""
        return self.config.patience is not None and exhausted(self.history, self.config.best, self.config.patience)

    def summary(self) -> dict[str, Any]:
        """{"means": a row a step, "metric": the one that chooses, "best": step, "stopped": bool, "warnings": lines}."""
        config, found = self.config, warnings(self.history, self.trained, self.config.held_out)
        scores = {step: scores.values.items() for step, scores in self.history.items()}
        means = [{"step": step} | {name: float(v.mean()) for name, v in row} for step, row in scores.items()]
        return {"means": means, "metric": config.best, "best": self.best, "stopped": self.stops, "warnings": found}


def validation_samples(config: EvaluationConfig) -> Samples:
    """The samples of the periodic evaluations. Each prompt has two images, so that their diversity is known.

    The images themselves are not kept.
    """
    prompts, pairs = load_prompts(config.validation_prompts or config.prompts), config.validation_samples // 2
    return draw_samples(prompts, config.model_copy(update={"samples": 2 * pairs, "grid": 0}), of_each=2)


def best_step(history: History, metric: str) -> int | None:
    """The first step with the highest mean of `metric`, or None if no step has a finite score.

    Step after step is compared with the best one before it, over the samples that had a finite score at all steps so
    far: an image without one decides nothing, and the best step is one whose weights were kept. A step without any
    finite score is never the best.
    """
    best, finite = None, np.True_
    for step, scores in history.items():
        own = np.isfinite(column := scores.values[metric])
        if not own.any():
            continue
        finite = finite & own
        if best is None or (finite.any() and column[finite].mean() > history[best].values[metric][finite].mean()):
            best = step
    return best


def exhausted(history: History, metric: str, patience: int) -> bool:
    """Whether `patience` evaluations have passed since the best step."""
    best = best_step(history, metric)
    return best is not None and sum(step > best for step in history) >= patience


def warnings(history: History, trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """What the last evaluation says against the run, each in one line; and images that had no finite score.

    A held-out metric fell from its best step on while a trained reward rose: both paired 95 % intervals exclude zero.
    An image statistic changed by more than its limit (metrics.yaml) since the first evaluation, and its interval
    excludes zero. If there are too few prompts for an interval, the line says so instead of judging the metric.
    """
    steps = list(history)
    if len(steps) < 2:
        return []
    first, last = steps[0], steps[-1]
    since_first = overall(history[first], history[last])
    silent = [row for metric, row in since_first.items() if metric in held_out and np.isnan(row["low"])]
    watched = {}
    for metric in held_out:
        lost = (~np.isfinite([scores.values[metric] for scores in history.values()])).any(axis=0)
        peak = best_step(history, metric)
        since_peak = overall(history[peak], history[last]) if peak not in (None, last) else {}
        watched[metric] = lost.sum(), len(lost), since_peak, peak
    drifted = []
    for metric, row in since_first.items():
        if (limit := METRICS.get(metric, {}).get("limit")) and row["before"] > 0:
            relative = row["change"] / row["before"]
            if relative * np.sign(limit) > abs(limit) and (row["low"] > 0 or row["high"] < 0):
                drifted.append((row, relative))
    found = {"silent": silent, "watched": watched, "drifted": drifted}
    return words("of_training", first=first, last=last, trained=trained, **found)


def overall(before: Scores, after: Scores) -> dict[str, Row]:
    """The paired change of each metric over all samples."""
    return {row["metric"]: row for row in compare(before, after) if row["category"] == "all"}
