"""The Python of the README and of docs/methods.md runs as it stands, and does what the pages say."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ToyField, toy_reward, toy_sigmas

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_example_trains_the_embedded_model(tmp_path):
    """Pasted into a file of its own, away from the checkout."""
    (example,) = blocks("README.md")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = [float(score) for score in re.findall(r"^step \d: reward (\S+)$", done.stdout, re.MULTILINE)]
    said = re.search(r"reward that rises from (\S+) to ([.\d]+):", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(scores) == 6 and scores[-1] > scores[0] + 0.05
    assert [scores[0], scores[-1]] == pytest.approx([float(said[1]), float(said[2])], abs=0.02)


def test_the_loop_of_ones_own_takes_an_optimizer_step():
    field = ToyField()
    text = torch.randn(2, 3, 6, dtype=torch.float64)
    names = {
        "network": field,
        "conditioning": {"text": text[0]},
        "unconditional": {"text": text[1]},
        "noise": torch.randn(3, 6, dtype=torch.float64),
        "sigmas": toy_sigmas(12),
        "decode": lambda x: x,
        "reward": toy_reward,
        "optimizer": torch.optim.SGD(field.parameters(), lr=0.1),
    }
    before = field.outer.detach().clone()
    exec(blocks("docs/methods.md")[0], names)
    assert not torch.equal(field.outer, before)


def test_the_composed_method_is_unbiased():
    names = {}
    exec(blocks("docs/methods.md")[1], names)
    sigmas, rng, total = toy_sigmas(12).numpy(), np.random.default_rng(0), np.zeros(12)
    for _ in range(4000):
        for node, weight in names["Stratified"](4).plan(sigmas, rng).active:
            total[node] += weight / 4000
    assert total == pytest.approx(np.diff(sigmas), rel=0.2)


def test_the_example_of_the_embedded_model_draws_a_picture():
    names = {}
    exec(blocks("docs/shapes.md")[0], names)
    assert names["image"].size == (32, 32)


def test_the_rewards_of_ones_own_score_images():
    names = {}
    exec(blocks("docs/rewards.md")[0], names)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    for reward in (names["warmth"], names["Sharpness"]("cpu")):
        scores = reward(images, ["a", "b"])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert scores.shape == (2,) and gradient.abs().sum() > 0
