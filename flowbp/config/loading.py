"""Where a config comes from: files, runs and presets, with overrides laid over them; and how two configs differ."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowbp import presets
from flowbp.config.registry import ConfigError, nearest
from flowbp.config.schema import RunConfig, is_one_reward

__all__ = ["changed", "dump", "flatten", "load", "merge", "parse_overrides", "read"]


def load(name: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of a YAML file, a run's folder or a preset, with `key.path=value` overrides applied. Raises
    ConfigError.
    """
    values: dict[str, Any] = {}
    for layer in read(name):
        merge(values, layer)
    merge(values, parse_overrides(overrides))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_readable(e) for e in error.errors())) from None


def read(name: str | Path) -> list[dict[str, Any]]:
    """The mappings that make up a config file, that of a run's folder, or a preset, each to be laid over those before
    it.
    """
    path = Path(name)
    if str(name) in presets.names() and not path.is_file():
        return presets.layers(str(name))
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        hint = nearest(str(name), presets.names())
        raise ConfigError(
            f"no config file {str(path)!r}, and unknown preset {str(name)!r}; {hint}flowbp presets lists them"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    return [values]


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["method.alpha=0.3", ...] -> {"method": {"alpha": 0.3}}; values are YAML."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} must read key.path=value, such as method.alpha=0.3")
        for part in reversed(key.split(".")):
            try:
                value = {part: value if isinstance(value, dict) else _number_or_yaml(value)}
            except yaml.YAMLError as error:
                raise ConfigError(
                    f"override {override!r}: the value is not YAML ({error.problem or error}); quote it"
                ) from None
        merge(values, value)
    return values


def merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge nested mappings in place. A method, pair sampler or reward of another name starts afresh: its fields are
    those of another.
    """
    for key, value in extra.items():
        old = base.get(key)
        both = isinstance(value, Mapping) and isinstance(old, dict)
        renamed = (
            both and key in ("method", "pairs", "reward") and value.get("name", old.get("name")) != old.get("name")
        )
        regrouped = both and key == "reward" and is_one_reward(value) != is_one_reward(old)
        if both and not renamed and not regrouped:
            merge(old, value)
        else:
            base[key] = copy.deepcopy(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """key.path -> (before, after) of what differs between two configs, sorted; None stands for a key that is not
    there.
    """
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _number_or_yaml(text: str) -> Any:
    try:
        return (
            float(text) if "e" in text.lower() and "." not in text else yaml.safe_load(text)
        )  # YAML reads 1e-4 as a string
    except (ValueError, yaml.YAMLError):
        return yaml.safe_load(text)


def _readable(error: Mapping[str, Any]) -> str:
    parts = error["loc"][error["loc"][:2] == ("reward", "reward") :]  # one reward is not named in the config
    where = ".".join(str(part) for part in parts)
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f", got {error['input']!r}"
    return f"{where}{': ' if where else ''}{message}{given}"
