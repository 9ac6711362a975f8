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

import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # for editors and type checkers
    from flowbp.backbones import bind_velocity, load_backbone  # noqa: F401
    from flowbp.config import RunConfig  # noqa: F401
    from flowbp.guidance import Guidance, GuidedVelocity  # noqa: F401
    from flowbp.methods import METHODS, DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL  # noqa: F401
    from flowbp.plan import Bridge, PosteriorMean, SurrogatePlan  # noqa: F401
    from flowbp.rewards import load_reward  # noqa: F401
    from flowbp.surrogate import backward, reward_input  # noqa: F401
    from flowbp.training.run import train  # noqa: F401
    from flowbp.trajectory import Trajectory, rollout, rollout_with_graph  # noqa: F401

_MODULES = {
    "flowbp.backbones": ["bind_velocity", "load_backbone"],
    "flowbp.config": ["RunConfig"],
    "flowbp.guidance": ["Guidance", "GuidedVelocity"],
    "flowbp.methods": "METHODS DRaFTLV DRTune FlowBPBridge FlowBPLagrange FlowBPSparse LeapAlign ReFL".split(),
    "flowbp.plan": ["Bridge", "PosteriorMean", "SurrogatePlan"],
    "flowbp.rewards": ["load_reward"],
    "flowbp.surrogate": ["backward", "reward_input"],
    "flowbp.training.run": ["train"],
    "flowbp.trajectory": ["Trajectory", "rollout", "rollout_with_graph"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value
    if importlib.util.find_spec(f"flowbp.{name}") is not None:
        return importlib.import_module(f"flowbp.{name}")
    raise AttributeError(f"flowbp has no {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(__all__)
