"""The README's Python runs, and its composed method is what it claims to be."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ToyField, toy_reward, toy_sigmas

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_loop_takes_an_optimizer_step():
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
    exec(BLOCKS[0], names)
    assert not torch.equal(field.outer, before)


def test_the_composed_method_is_unbiased():
    names = {}
    exec(BLOCKS[1], names)
    sigmas, rng, total = toy_sigmas(12).numpy(), np.random.default_rng(0), np.zeros(12)
    for _ in range(4000):
        for node, weight in names["Stratified"](4).plan(sigmas, rng).active:
            total[node] += weight / 4000
    assert total == pytest.approx(np.diff(sigmas), rel=0.2)


def test_every_file_the_readme_links_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
