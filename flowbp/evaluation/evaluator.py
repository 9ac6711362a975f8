"""The evaluations of a run: fixed samples, and scorers that are loaded once."""

from collections.abc import Callable, Mapping

from torch import Tensor

from flowbp.config import RunConfig
from flowbp.evaluation.scores import Samples, Scorer, Scores, draw_samples, evaluate, scorers
from flowbp.rewards import Reward
from flowbp.runtime.data import load_prompts
from flowbp.runtime.tuned_model import TunedModel


class Evaluator:
    """Scores any weights of a model on the samples of `config.evaluation`, or on others.

    With `evaluation.watch`, monitors and checker stay in memory from the first evaluation on. Without it, they are
    released after each one.
    """

    def __init__(self, config: RunConfig, rewards: Mapping[str, Reward], device: str):
        """rewards: those that are trained on."""
        self.config, self.rewards, self.device = config, rewards, device
        options = config.evaluation
        self.samples = draw_samples(load_prompts(options.prompts), options)
        # Monitors are loaded even if they are not watched, so that a missing one is an error before training.
        monitors = options.load_monitors(device if options.watch else "cpu")
        self.monitors = monitors if options.watch else {}
        self._scorers: dict[str, Scorer] | None = None

    def score(
        self,
        model: TunedModel,
        weights: Mapping[str, Tensor],
        samples: Samples | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Scores:
        """Scores of images drawn with `weights`. The processes share the work and all get all scores."""
        scored_by = self._scorers or self.load()
        if self.config.evaluation.watch:
            self._scorers = scored_by
        sampling, guidance = self.config.evaluation_rollout, self.config.guidance
        with model.using(weights) as backbone:
            return evaluate(backbone, samples or self.samples, sampling, guidance, scored_by, progress)

    def load(self) -> dict[str, Scorer]:
        """Rewards, monitors, checker and image statistics by name."""
        options = self.config.evaluation
        return scorers(options, self.rewards, self.monitors or options.load_monitors(self.device), self.device)
