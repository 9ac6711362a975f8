"""Align text-to-image flow models with a differentiable reward, by backpropagation through the sampler.

In a loop of your own:

    plan = FlowBPSparse(num_active=4).plan(sigmas, rng)       which steps get gradient, and how much
    velocity = GuidedVelocity(network, conditioning, ...)     the network under guidance
    trajectory = rollout(velocity, noise, sigmas, plan)       samples without gradient, keeps what the plan reads
    x = reward_input(plan, trajectory)                        what the reward is to see
    backward(plan, trajectory, velocity.replay, g)            sends g = dloss/dx to the parameters

A whole run: train(flowbp.config.load("demo")), or `flowbp train demo` on the command line. load_backbone and
load_reward open models by name. A name is loaded when it is first used: importing flowbp imports nothing else.
"""

import ast
import importlib.util
import logging
from pathlib import Path
from typing import Any

__version__ = "0.2.0"
log = logging.getLogger(__name__)  # of all that flowbp has to say

# The module of each public name, from the stub that tells editors of them too.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
_HOME = {_name.name: _line.module for _line in _STUB.body if isinstance(_line, ast.ImportFrom) for _name in _line.names}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(importlib.import_module(str(_HOME[name])), name)
        return value
    if importlib.util.find_spec(f"flowbp.{name}") is not None:
        return importlib.import_module(f"flowbp.{name}")
    raise AttributeError(f"flowbp has no {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(__all__)
