"""Equal numbers give equal bytes wherever they lie: resumed runs, evaluations and saved weights rest on it."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from displaced import OFFSETS, Displaced, frozen

from flowbp.backbones import load_backbone
from flowbp.config import load
from flowbp.evaluation import scores as evaluation
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.runtime.reproducible import MODE, TOO_LATE, math_library, mkl_is_reproducible
from flowbp.runtime.weights import load_weights, save_weights
from flowbp.training.trainer import Trainer

SMALL = [
    "steps=2", "data.batch_size=2", "rollout={num_steps: 4, height: 32, width: 32}", "guidance.scale=2.0",
    "method={name: flowbp-bridge, num_active: 2}", "optimizer={lr: 1.0e-2, max_grad_norm: 1.0}", "ema=0.5",
    "evaluation.samples=3", "evaluation.batch_size=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(backbone_overrides, tmp_path_factory):
    """A trainer, and the folder of a run whose checkpoint is of its first step."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(load("demo", [f"output={folder}", *SMALL, *backbone_overrides]))
    trainer.step(0)
    save_checkpoint(folder, 1, *state(trainer))
    return trainer, folder


def state(trainer):
    return trainer.model, trainer.optimizer, trainer.rewards


def second_step(run):
    """What a run that is resumed after its first step logs of the second, and its weights and their average after
    it.
    """
    trainer, folder = run
    assert load_checkpoint(latest_checkpoint(folder), *state(trainer)) == 1
    row = trainer.step(1)
    logged = {key: value for key, value in row.items() if not key.endswith("seconds") and key != "peak_mb"}
    return logged, [p.detach().clone() for p in (*trainer.model.parameters.values(), *trainer.model.ema.shadow_params)]


def evaluated(trainer, backbone):
    """Scores by metric, and pictures, of three samples that `backbone` draws."""
    config = trainer.config
    named, samples = trainer.evaluator.load(), trainer.evaluator.samples
    score = partial(evaluation.score_chunk, backbone, samples, config, named)
    found = evaluation.evaluate(samples, score, lambda done: None)
    return {name: column.tolist() for name, column in found.values.items()} | {"pictures": found.images.tolist()}


@pytest.fixture(scope="module")
def offsets(backbone_overrides):
    """All offsets for the embedded model, and the smallest for the others."""
    return OFFSETS if "backbone.name=shapes" in backbone_overrides else OFFSETS[:1]


@pytest.fixture(scope="module")
def expected(run):
    """(second step, its weights, the evaluation of what the run then saves), with all tensors where torch puts them."""
    trainer, folder = run
    logged, weights = second_step(run)
    with trainer.model.using(trainer.model.tuned):
        save_weights(trainer.model.backbone, folder)
        with frozen(trainer.model.backbone.denoiser):
            return logged, weights, evaluated(trainer, trainer.model.backbone)


def test_the_tests_themselves_run_in_the_reproducible_mode():
    assert mkl_is_reproducible() is not False, f"{MODE} is {os.environ[MODE]!r}, which MKL does not take for a mode"


def test_a_resumed_run_takes_the_step_of_an_unbroken_one_wherever_its_tensors_lie(run, expected, offsets):
    for offset in offsets:
        with Displaced(offset):
            logged, weights = second_step(run)
        assert logged == expected[0], offset
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, expected[1], strict=True)), offset


def test_a_saved_lora_has_the_scores_and_pictures_of_its_run_wherever_tensors_lie(run, expected, offsets):
    trainer, folder = run
    backbone = load_backbone(**trainer.config.backbone.model_dump())
    load_weights(backbone, folder)
    backbone.encode = trainer.model.backbone.encode  # the same embeddings, from their files
    for offset in offsets:
        with Displaced(offset):
            assert evaluated(trainer, backbone) == expected[2], offset


# -- asking for the mode ---------------------------------------------------------------------------------------------

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")
MULTIPLY = "import torch; torch.ones(8, 8) @ torch.ones(8, 8)"


def python(*arguments, **environment):
    """A process that inherits no mode."""
    inherited = {name: value for name, value in os.environ.items() if name != MODE}
    return subprocess.run([sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True)


@needs_mkl
@pytest.mark.parametrize(("before", "said"), [("", "True"), ("import torch", "True"), (MULTIPLY, "False")])
def test_mkl_takes_the_mode_until_it_multiplies(before, said):
    ask = (
        "from flowbp.runtime.reproducible import *; asked = request_equal_bytes(); print(asked, mkl_is_reproducible())"
    )
    assert python("-c", f"{before}\n{ask}").stdout.split() == [said, said]


def test_the_command_line_asks_before_it_loads_torch():
    done = python("-m", "flowbp", "doctor")
    assert done.returncode == 0 and "not reproducible" not in done.stdout and TOO_LATE not in done.stderr
    assert ("MKL, reproducible" in done.stdout) == torch.backends.mkl.is_available()


@needs_mkl
def test_a_mode_that_comes_too_late_is_told_by_the_command_line_and_refused_by_the_tests(tmp_path):
    (tmp_path / "early.py").write_text(MULTIPLY)
    command = f"{MULTIPLY}; from flowbp.__main__ import main; main()"
    done = python("-c", command, "presets")
    assert done.returncode == 0 and done.stderr.count(TOO_LATE) == 1
    done = python("-m", "pytest", "-p", "early", "--collect-only", __file__, PYTHONPATH=str(tmp_path))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and TOO_LATE in done.stderr


def test_a_torch_without_mkl_is_said_to_be_of_unknown_bytes(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert mkl_is_reproducible() is None and math_library().startswith("not MKL")
