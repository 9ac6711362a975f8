"""Typed, strict configuration of a run. Unknown keys and names are errors that name the nearest known one.

A config is a YAML file, the folder of a run, or the name of a preset (`flowbp.presets`), with `key.path=value`
overrides. Method, pair sampler, guidance and smoothing are built straight from their constructors: their fields are
their configuration. What can be known without loading a model is checked here.
"""

from flowbp.config.loading import changed, commented, dump, flatten, load, parse_overrides
from flowbp.config.registry import ConfigError, build_method, describe
from flowbp.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "build_method", "changed", "commented", "describe", "dump"]
__all__ += ["flatten", "load", "parse_overrides"]
