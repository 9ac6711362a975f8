"""The evaluations of a run: fixed samples, and scorers that are loaded once."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from flowbp.config import RunConfig
from flowbp.evaluation.scores import Samples, Scorer, Scores, draw_samples, evaluate, score_chunk, scorers
from flowbp.rewards import Reward
from flowbp.runtime.data import load_prompts
from flowbp.runtime.tuned_model import TunedModel


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
        self,
        model: TunedModel,
        weights: Mapping[str, Tensor],
        samples: Samples | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Scores:
        """Scores of images drawn with `weights`. The processes share the work and all get all scores."""
        named, samples = self._scorers or self.load(), samples or self.samples
        settings = self.config.evaluation_rollout, self.config.evaluation_guidance
        with model.using(weights) as backbone, model.ranks.gathering():
            return evaluate(samples, partial(score_chunk, backbone, samples, *settings, named), progress)

    def load(self) -> dict[str, Scorer]:
        """Rewards, monitors, checker and image statistics by name."""
        options = self.config.evaluation
        return scorers(options, self.rewards, self.monitors or options.load_monitors(self.device), self.device)
