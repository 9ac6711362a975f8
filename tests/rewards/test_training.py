"""Rewards in the trainer: each trains the embedded model, alone and together, and a resumed run repeats an unbroken
one.
"""

import numpy as np
import pytest
import tiny_rewards as tiny
import torch

from flowbp.config import load
from flowbp.rewards.weighted import WeightedRewards
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.training.trainer import Trainer

TINY = [
    "steps=3",
    "data.batch_size=2",
    "rollout.num_steps=3",
    "method={name: refl, last_n: 1}",
    "evaluation=null",
    "ema=null",
]


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def trainer(tmp_path, *overrides):
    return Trainer(load("demo", [f"output={tmp_path / 'run'}", *TINY, *overrides]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", [*tiny.FOLDERS, f"{__name__}:redness"])
def test_every_reward_trains_the_embedded_model(name, folders, run):
    config = load("demo", [f"reward={{name: '{name}', model: {folders.get(name, 'null')}}}"])
    run.rewards = WeightedRewards({key: spec.term() for key, spec in config.reward.items()})
    before = {key: p.detach().clone() for key, p in run.model.parameters.items()}
    rows = [run.step(step) for step in range(3)]
    assert all(np.isfinite(row["reward"]) and 0 < row["grad_norm"] < np.inf and not row["skipped"] for row in rows)
    assert any(not torch.equal(run.model.parameters[key], before[key]) for key in before)


MIXTURE = f"""reward={{
    shape: {{model: shapes, hinge: 0.8, smooth: {{copies: 2}}}},
    red: {{name: "{__name__}:redness", weight: 0.5, normalise: true}}}}"""


def test_a_resumed_mixture_of_rewards_equals_an_unbroken_one(tmp_path):
    whole, broken, resumed = (trainer(tmp_path, MIXTURE) for _ in range(3))
    rows = [whole.step(step) for step in range(3)]
    assert all(np.isfinite(row["shape"]) and np.isfinite(row["red"]) for row in rows)
    for step in range(2):
        broken.step(step)
    save_checkpoint(tmp_path, 2, broken.model, broken.optimizer, broken.rewards)
    found = latest_checkpoint(tmp_path)
    assert load_checkpoint(found, resumed.model, resumed.optimizer, resumed.rewards) == 2
    again = resumed.step(2)
    assert again["loss"] == rows[2]["loss"]
    assert all(
        torch.equal(whole.model.parameters[key], resumed.model.parameters[key]) for key in whole.model.parameters
    )
