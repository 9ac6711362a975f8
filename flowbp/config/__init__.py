"""Typed, strict configuration of a run. Unknown keys and names are errors that name the nearest known one.

A config is a YAML file, the folder of a run, or the name of a preset (`flowbp.presets`), with `key.path=value`
overrides. Method, pair sampler, guidance and smoothing are built straight from their constructors: their fields are
their configuration. What can be known without loading a model is checked here.
"""

from flowbp.config import loading, registry, schema
from flowbp.config.loading import *  # noqa: F403
from flowbp.config.registry import *  # noqa: F403
from flowbp.config.schema import *  # noqa: F403

__all__ = []
__all__ += loading.__all__
__all__ += registry.__all__
__all__ += schema.__all__
