"""The over-optimisation sentinel: held-out metrics at regular steps of training, the best step by one of them, and when to stop.

Whatever reward is maximised, its true aim first improves with it and then falls (Gao et al. 2023, arXiv 2210.10760). So the same held-out
prompts and seeds are scored every `evaluation.every` steps, in files of their own:

    RUN/validation/step-000050.safetensors    scores [n] float64 by metric, of the weights after 50 steps
    RUN/best/                                 the weights of the best step, by `evaluation.best`

All decisions are functions of these files: a resumed run forgets those after its checkpoint and decides as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from flowbp.config import EvaluationConfig
from flowbp.evaluation.numbers import between, scale_of_change, signed
from flowbp.evaluation.scores import Difference, Samples, Scores, compare, draw_samples
from flowbp.runtime.data import load_prompts
from flowbp.runtime.files import replacing

__all__ = ["Sentinel", "best_step", "exhausted", "warnings"]

History = Mapping[int, Scores]  # by optimizer steps taken, increasing; all of the same samples

LIMITS = {  # relative changes of image statistics since the first evaluation that are worth a warning: a judgement, not a law
    "diversity": (-0.5, "images of a prompt grow alike: the model may be collapsing"),
    "saturation": (0.5, "colours grow stronger than the base model's"),
    "high_frequency": (0.5, "fine patterns grow: look for grids and fringes"),
}


class Sentinel:
    """The periodic evaluations of the run in `output`."""

    def __init__(self, config: EvaluationConfig, trained: Iterable[str], output: Path):
        """trained: names of the rewards that training maximises."""
        self.config, self.trained, self.folder = config, tuple(trained), output / "validation"
        self.samples = validation_samples(config)

    def due(self, steps: int) -> bool:
        """Whether the weights after `steps` optimizer steps are to be scored."""
        return steps % self.config.every == 0 and not self.file(steps).is_file()

    def file(self, steps: int) -> Path:
        return self.folder / f"step-{steps:06d}.safetensors"

    def record(self, steps: int, scores: Scores) -> None:
        self.folder.mkdir(exist_ok=True)
        with replacing(self.file(steps)) as scratch:
            save_file({name: np.ascontiguousarray(values) for name, values in scores.values.items()}, scratch)

    def forget_after(self, done: int) -> None:
        """Drop evaluations made after the checkpoint that a run resumes from."""
        for path in self.folder.glob("step-*.safetensors"):
            if step_of(path) > done:
                path.unlink()

    @property
    def history(self) -> dict[int, Scores]:
        files = sorted(self.folder.glob("step-*.safetensors"))
        return {step_of(path): Scores(self.samples.prompts, self.samples.seeds, load_file(path)) for path in files}

    def is_best(self, steps: int, scores: Scores) -> bool:
        """Whether the weights after `steps` steps, not recorded yet, are the best so far by `evaluation.best`."""
        return self.config.best is not None and best_step(self.history | {steps: scores}, self.config.best) == steps

    @property
    def best(self) -> int | None:
        """The best step by `evaluation.best`, if there is one."""
        history = self.history
        return best_step(history, self.config.best) if self.config.best and history else None

    @property
    def stops(self) -> bool:
        """Whether `evaluation.patience` is at its end."""
        return self.config.patience is not None and exhausted(self.history, self.config.best, self.config.patience)

    def summary(self) -> dict:
        """{"means": a row a step, "metric": the one that chooses, "best": step, "stopped": bool, "warnings": lines}."""
        history = self.history
        held_out = [*self.config.monitors, *(["checker"] if self.config.checker is not None else [])]
        means = [{"step": step} | {name: float(v.mean()) for name, v in scores.values.items()} for step, scores in history.items()]
        found = warnings(history, self.trained, held_out)
        return {"means": means, "metric": self.config.best, "best": self.best, "stopped": self.stops, "warnings": found}


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def validation_samples(config: EvaluationConfig) -> Samples:
    """The samples of the periodic evaluations: two images of each of validation_samples // 2 prompts, for their diversity; none is kept."""
    prompts, pairs = load_prompts(config.validation_prompts or config.prompts), config.validation_samples // 2
    return draw_samples(prompts, config.model_copy(update={"samples": 2 * pairs, "grid": 0}), of_each=2)


def best_step(history: History, metric: str) -> int:
    """The step with the highest mean of `metric`; of equal ones the first. A mean that is not a number is the lowest."""
    return max(history, key=lambda step: (np.nan_to_num(history[step].values[metric].mean(), nan=-np.inf), -step))


def exhausted(history: History, metric: str, patience: int) -> bool:
    """Whether `patience` evaluations have passed since the best step."""
    return bool(history) and sum(step > best_step(history, metric) for step in history) >= patience


def warnings(history: History, trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """What the last evaluation says against the run, each in one line.

    A held-out metric fell from its best step on while a trained reward rose: both paired 95 % intervals exclude zero. An image statistic
    changed by more than `LIMITS` since the first evaluation, and its interval excludes zero. With too few prompts for an interval, that.
    """
    steps = list(history)
    if len(steps) < 2:
        return []
    found = [
        f"nothing can be said of {row.metric}: {row.count} scored images of {row.prompts} prompts bear no interval; with finite scores of "
        f"six prompts, evaluation.validation_samples=12, they do"
        for metric, row in overall(history[steps[0]], history[steps[-1]]).items()
        if metric in held_out and np.isnan(row.low)
    ]
    for metric in held_out:
        peak = best_step(history, metric)
        if peak == steps[-1]:
            continue
        changes = overall(history[peak], history[steps[-1]])
        for reward in trained:
            if changes[reward].low > 0 and changes[metric].high < 0:
                found.append(
                    f"over-optimised: from step {peak} to {steps[-1]} the trained {reward} rose by {change(changes[reward])} while the "
                    f"held-out {metric} fell by {change(changes[metric])}; step {peak} may be the better model"
                )
    changes = overall(history[steps[0]], history[steps[-1]])
    for metric, (limit, meaning) in LIMITS.items():
        if metric in changes and changes[metric].before > 0:
            row = changes[metric]
            relative = row.change / row.before
            if relative * np.sign(limit) > abs(limit) and (row.low > 0 or row.high < 0):
                found.append(f"{metric} changed by {relative:+.0%} since step {steps[0]}, {change(row)}: {meaning}")
    return found


def overall(before: Scores, after: Scores) -> dict[str, Difference]:
    """The paired change of each metric over all samples."""
    return {row.metric: row for row in compare(before, after) if row.category == "all"}


def change(row: Difference) -> str:
    scale = scale_of_change(vars(row))
    return f"{signed(row.change, scale)} {between((row.low, row.high), scale)}"
