"""The sentinel sees over-optimisation, leaves training as it is, and decides alike after a kill."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowbp.config import ConfigError, load
from flowbp.evaluation import scores as scoring
from flowbp.evaluation.scores import Scores
from flowbp.runtime.data import Prompt, load_prompts
from flowbp.runtime.run_folder import RunFolder
from flowbp.runtime.weights import LORA
from flowbp.training.run import run, train
from flowbp.training.sentinel import Sentinel, best_step, exhausted, validation_samples, warnings
from flowbp.training.trainer import Trainer

N = 60


def history(**curves):
    """Scores of the same samples at steps 0, 50, 100, ... whose means are those of `curves`, with a luck that each seed
    keeps.
    """
    rng = np.random.default_rng(0)
    prompts, seeds, luck = [Prompt(str(i)) for i in range(N)], list(range(N)), rng.normal(size=N)
    found = {}
    for i, means in enumerate(zip(*curves.values(), strict=True)):
        noise = rng.normal(size=(len(means), N))
        noise -= noise.mean(axis=1, keepdims=True)
        found[50 * i] = Scores(
            prompts, seeds, {k: m + luck - luck.mean() + 0.1 * e for k, m, e in zip(curves, means, noise, strict=True)}
        )
    return found


def test_a_reward_that_rises_while_a_monitor_falls_is_named_with_the_step():
    (line,) = warnings(history(reward=[0, 1, 2, 3], monitor=[0, 1, 0.6, 0.5]), ["reward"], ["monitor"])
    assert (
        line.startswith("over-optimised: from step 50 to 150 the trained reward rose by +2.000")
        and "monitor fell by -0.500" in line
    )


@pytest.mark.parametrize(
    "curves",
    [
        {"reward": [0, 1, 2], "monitor": [0, 1, 2]},
        {"reward": [0, 1, 0.5], "monitor": [0, 1, 0.5]},  # both fell: the run is bad, the reward is not exploited
        {"reward": [0, 1, 2], "monitor": [0, 1, 0.999]},  # within the interval
        {"reward": [0], "monitor": [0]},
    ],
)
def test_a_run_without_that_is_not_accused(curves):
    assert warnings(history(**curves), ["reward"], ["monitor"]) == []


@pytest.mark.parametrize(
    ("metric", "end", "warned"),
    [
        ("diversity", 6, False),
        ("diversity", 4, True),
        ("diversity", 16, False),
        ("saturation", 16, True),
        ("high_frequency", 14, False),
    ],
)
def test_image_statistics_warn_beyond_their_limit_and_in_their_direction(metric, end, warned):
    found = warnings(history(**{"reward": [0, 1], metric: [10, end + 0.01]}), ["reward"], [])
    assert bool(found) == warned and all(line.startswith(f"{metric} changed by") for line in found)


def test_every_prompt_has_two_images_so_that_diversity_is_measured():
    config = load("demo", ["evaluation.every=1", "evaluation.validation_samples=13"]).evaluation
    expected = load_prompts("shapes:test")[:6]
    drawn = validation_samples(config).prompts
    assert drawn[::2] == drawn[1::2] == expected


def test_too_few_prompts_are_said_instead_of_no_warning():
    few = {
        step: Scores(scores.prompts[:5], scores.seeds[:5], {name: values[:5] for name, values in scores.values.items()})
        for step, scores in history(reward=[0, 1], monitor=[1, 0]).items()
    }
    (line,) = warnings(few, ["reward"], ["monitor"])
    assert line.startswith("nothing can be said of monitor: 5 scored images of 5 prompts bear no interval")


def test_the_best_step_is_the_first_of_the_highest_and_patience_counts_from_it():
    seen = history(monitor=[0, 2, 1, 2, 1.5])
    seen[150].values["monitor"][:] = seen[50].values["monitor"]
    assert best_step(seen, "monitor") == 50
    assert [exhausted(seen, "monitor", patience) for patience in (2, 3, 4)] == [True, True, False]
    assert not exhausted({}, "monitor", 1)


def test_what_was_scored_before_a_kill_is_not_scored_again():
    config = load("demo", ["evaluation.every=2", "evaluation.validation_samples=2"]).evaluation
    past = {step: {"reward": np.zeros(2), "monitor": np.zeros(2)} for step in (0, 2)}
    sentinel = Sentinel(config, ["reward"], past)
    assert [step for step in range(7) if sentinel.due(step)] == [4, 6]


def test_a_resumed_run_keeps_what_was_logged_and_scored_up_to_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(4):
        folder.log({"step": step + 1})
        folder.keep_validation(step, {"monitor": np.array([float(step)])})
    folder.forget_after(2)
    assert [row["step"] for row in folder.metrics()] == [1, 2] and list(folder.validations()) == [0, 1, 2]


def with_nan(seen, metric, *places):
    """The history with no finite score of `metric` at (step, samples)."""
    for step, samples in places:
        seen[step].values[metric][samples] = np.nan
    return seen


def test_one_image_without_a_score_does_not_choose_the_best_step():
    curve = [0, 1.5, 2, 1]
    for step in (0, 100, 150):
        seen = with_nan(history(monitor=curve), "monitor", (step, 7))
        assert best_step(seen, "monitor") == 100 and not exhausted(seen, "monitor", 2)
    seen = with_nan(history(monitor=curve), "monitor", (100, slice(None)))
    assert best_step(seen, "monitor") == 50, "a step without any score is not the best"
    assert exhausted(seen, "monitor", 2), "but it counts"
    seen = with_nan(history(monitor=curve), "monitor", *((step, slice(None)) for step in (0, 50, 100, 150)))
    assert best_step(seen, "monitor") is None and not exhausted(seen, "monitor", 1)


def test_the_best_step_is_one_whose_weights_were_kept():
    """An image that loses its score later does not move the choice back to weights that were overwritten."""
    seen = history(monitor=[0, 1, 0.5])
    seen[0].values["monitor"][7] = -1e3  # without this image step 0 is above step 50
    seen[50].values["monitor"][:] -= 2
    seen[50].values["monitor"][7] = 1e3
    seen[100].values["monitor"][:] = -9
    kept = [best_step(dict(list(seen.items())[: i + 1]), "monitor") for i in range(2)]
    with_nan(seen, "monitor", (100, 7))
    assert kept == [0, 50] and best_step(seen, "monitor") == 50


def test_images_without_a_score_are_told():
    seen = with_nan(history(reward=[0, 1, 2], monitor=[0, 1, 2]), "monitor", (50, [3, 8]), (100, 3))
    (line,) = warnings(seen, ["reward"], ["monitor"])
    assert line.startswith(f"2 of {N} images have no finite monitor at some step: the others decide")


PERIODIC = [
    "evaluation.every=1",
    "evaluation.best=monitor",
    "evaluation.validation_samples=4",
    "evaluation.validation_prompts=shapes:dev",
]
SMALL = [
    "data.batch_size=2",
    "rollout.num_steps=4",
    "checkpoint_every=2",
    "method.name=draft-lv",
    "evaluation.samples=4",
    "evaluation.grid=4",
]


def weights(folder):
    return load_file(folder / LORA)


def test_watching_leaves_training_bit_identical_and_resumes_exactly(tmp_path, monkeypatch):
    for module in ("flowbp.training.run", "flowbp.evaluation.pages"):  # pictures take longer than these runs
        monkeypatch.setattr(f"{module}.as_png", lambda figure: b"")
    blind = train(load("demo", [f"output={tmp_path / 'blind'}", "steps=3", *SMALL]))
    whole = train(load("demo", [f"output={tmp_path / 'whole'}", "steps=3", *SMALL, *PERIODIC]))
    expected = weights(blind)
    assert all(expected[key].equal(value) for key, value in weights(whole).items()), "watching changed the training"
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (blind, whole)
    ]
    assert losses[0] == losses[1]

    broken = load("demo", [f"output={tmp_path / 'broken'}", "steps=3", *SMALL, *PERIODIC])
    RunFolder(broken.output).open(broken)
    killed = Trainer(broken)
    step, kill_at = killed.step, 2
    killed.step = lambda i: step(i) if i < kill_at else pytest.fail("killed")
    with pytest.raises(pytest.fail.Exception):
        run(killed, RunFolder(broken.output))
    stale = broken.output / "validation" / "step-000003.safetensors"  # as if seen after the checkpoint, before the kill
    shutil.copy(whole / "validation" / "step-000000.safetensors", stale)
    train(broken, resume=True)
    names = [f"validation/step-{i:06d}.safetensors" for i in range(4)] + ["validation.json"]
    assert [name for name in names if (whole / name).read_bytes() != (broken.output / name).read_bytes()] == []
    for folder in (".", "best"):
        assert all(weights(whole / folder)[key].equal(value) for key, value in weights(broken.output / folder).items())
    best = json.loads((whole / "validation.json").read_text())["best"]
    assert best == max(
        range(4), key=lambda i: load_file(whole / "validation" / f"step-{i:06d}.safetensors")["monitor"].mean().item()
    )
    assert "Held-out prompts during training" in (whole / "report.html").read_text()


@pytest.fixture
def scored(monkeypatch):
    """Lets the reward rise by 1 from one evaluation to the next, and the monitor by `slope`."""

    def score(slope):
        calls = itertools.count(1)

        def evaluate(samples, *_):
            now = np.full(len(samples.prompts), float(next(calls)))
            values = {"reward": now, "monitor": slope * now, "checker": 0 * now}
            return Scores(samples.prompts, samples.seeds, values, torch.zeros(4, 3, 32, 32, dtype=torch.uint8))

        monkeypatch.setattr(scoring, "evaluate", evaluate)

    return score


def test_the_best_weights_are_the_average_that_a_run_of_as_many_steps_delivers(tmp_path, scored):
    scored(slope=1.0)
    config = load("demo", [f"output={tmp_path / 'run'}", "steps=1", "ema=0.5", *SMALL, *PERIODIC])
    delivered, best = weights(train(config)), weights(config.output / "best")
    assert json.loads((config.output / "validation.json").read_text())["best"] == 1
    assert all(torch.equal(best[key], value) for key, value in delivered.items())


def test_training_stops_when_patience_ends_and_stays_stopped(tmp_path, scored):
    scored(slope=-1.0)
    twelve = ["evaluation.validation_samples=12", "evaluation.patience=2"]
    config = load("demo", [f"output={tmp_path / 'run'}", "steps=9", *SMALL, *PERIODIC, *twelve])
    train(config)
    train(config, resume=True)
    assert len((config.output / "metrics.jsonl").read_text().splitlines()) == 2
    found = json.loads((config.output / "validation.json").read_text())
    assert found["stopped"] and found["best"] == 0 and "over-optimised" in found["warnings"][0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluation.best=monitor"], "best=monitor needs every"),
        (["evaluation.every=1", "evaluation.best=reward"], "unknown held-out metric for evaluation.best 'reward'"),
        (["evaluation.every=1", "evaluation.patience=2"], "patience=2 needs best"),
    ],
)
def test_a_best_step_needs_a_held_out_metric(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load("demo", overrides)
