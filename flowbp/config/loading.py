"""Where a config comes from (files, runs and presets, with overrides laid over them), and how two configs differ."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowbp import presets
from flowbp.config.registry import ConfigError, own_code
from flowbp.config.schema import MemoryConfig, RunConfig, is_one_reward
from flowbp.given import FOLDERS, cut, digest_text, nearest, read_text, short

CONFIG = "config.yaml"  # in the folder of a run
LONGEST = 2**16  # characters of a config
SEAL = "# SHA-256 of the lines below, as the run wrote them: "
NAMED = ("method", "pairs", "reward")  # keys of {name: ..., **fields}


def load(name: str | Path, overrides: Iterable[str] = (), run_code: bool = True) -> RunConfig:
    """The config of a YAML file, a run's folder or a preset, with overrides `key.path=value`. Raises ConfigError.

    A config is code: a method that it names as "module:Class" is imported, which runs the module; so are its rewards
    and its checker when they are loaded. Without `run_code`, as for a config that is only read, a method is imported
    if an override names it, and is `Unimported` otherwise.
    """
    values: dict[str, Any] = {}
    try:
        for layer in (*read(name), typed := parse_overrides(overrides)):
            merge(values, layer)
        return RunConfig.model_validate(values, context=None if run_code else own_code(typed))
    except ValidationError as error:
        raise ConfigError("\n".join(readable(e) for e in error.errors()[:10])) from None
    except RecursionError:
        raise ConfigError(f"{name} or an override nests deeper than any config does") from None


def read(name: str | Path) -> list[dict[str, Any]]:
    """The mappings that make up a config, each to be laid over those before it. A preset can have several."""
    path = Path(name)
    if (preset := presets.layers(str(name))) and not path.is_file():
        return preset
    if path.is_dir():
        path = path / CONFIG
    if not path.is_file():
        hint = f"{nearest(str(name), presets.names())}flowbp presets lists them"
        raise ConfigError(f"no config file {str(path)!r}, and unknown preset {str(name)!r}; {hint}")
    try:
        text = read_text(path, LONGEST)
        values = yaml.load(text, StrictYAML)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {cut(error, 400)}") from error
    if text.startswith(SEAL) and text != sealed(text.partition("\n")[2]):
        way_out = "restore it from a copy, or, if you changed it, delete its first line"
        raise ConfigError(f"{path} has changed since its run wrote it: {way_out}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    FOLDERS.append(path.parent)
    return [values]


class StrictYAML(yaml.SafeLoader):
    """YAML without what surprises: a key that stands twice, of which the last would win; 0300, which is 192; 1:30,
    which is 90; and an alias, of which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "an alias is not read here: write its value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {short(key.value)} stands here again", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.lstrip("+-")
        if ":" in text or (text.startswith("0") and text[1:2].isdigit()):
            problem = f"{cut(node.value)} would be read in base 60 or 8: write a plain number"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


StrictYAML.add_constructor("tag:yaml.org,2002:int", StrictYAML.construct_number)
StrictYAML.add_constructor("tag:yaml.org,2002:float", StrictYAML.construct_number)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["method.alpha=0.3", ...] -> {"method": {"alpha": 0.3}}; values are YAML."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {short(override)} must read key.path=value, such as method.alpha=0.3")
        for part in reversed(key.split(".")):
            try:
                value = {part: value if isinstance(value, dict) else _number_or_yaml(value)}
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                cause = cut(getattr(error, "problem", None) or error)
                raise ConfigError(f"override {short(override)}: the value is not YAML ({cause}); quote it") from None
        merge(values, value)
    return values


def merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge nested mappings in place. A method, pair sampler or reward of another name drops the old one's fields; its
    name alone is short for {name: it}. A checker is replaced whole. Raises ConfigError for a mapping that would be laid
    over any other text.
    """
    for key, value in extra.items():
        old = base.get(key)
        if key in NAMED:
            value, old = ({"name": it} if isinstance(it, str) else it for it in (value, old))
        elif key != "checker" and isinstance(value, Mapping) and isinstance(old, str):
            fields = cut(" or ".join(map(str, value)))
            raise ConfigError(f"{key} is {short(old)}, which has no {fields}: give {cut(key)} once")
        nested = isinstance(value, Mapping) and isinstance(old, dict)
        if nested and key in NAMED and "name" in old:
            nested = value.get("name", old["name"]) == old["name"]
        if nested and key == "reward":
            nested = is_one_reward(value) == is_one_reward(old)
        if nested:
            merge(old, value)
        base[key] = old if nested else copy.deepcopy(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """key.path -> (before, after) of what differs between two configs, sorted; None where a config lacks the key.

    The section `memory` is compared as it is read today: older runs wrote `shard: true` for "all", and no `gather`.
    """
    before, after = (flatten(dict(c, memory=MemoryConfig(**(c.get("memory") or {})).model_dump())) for c in (old, new))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def commented(text: str) -> str:
    """What `dump` gives, with the description of each key behind it."""
    lines, path = [], []
    for line in text.splitlines():
        name = line.strip().partition(":")[0]
        if not line.strip().startswith("- "):
            path = [*path[: (len(line) - len(line.lstrip())) // 2], name]
        cls, field = RunConfig, None
        for part in path:
            field = cls.model_fields.get(part) if cls is not None else None
            cls = dict(cls.sections()).get(part) if cls is not None else None
        about = field.description if field is not None and path[-1] == name else None
        lines.append(f"{line}  # {about}" if about else line)
    return "\n".join(lines) + "\n"


def sealed(text: str) -> str:
    """A config as a run keeps it: its first line, a comment, has the digest of the others, which `read` checks."""
    return f"{SEAL}{digest_text(text)}\n{text}"


def _number_or_yaml(text: str) -> Any:
    """The YAML value of `text`, but 1e-4 is a number: YAML itself reads a string where there is no point."""
    try:
        return float(text) if "e" in text.lower() and "." not in text else yaml.load(text, StrictYAML)
    except (ValueError, yaml.YAMLError):
        return yaml.load(text, StrictYAML)


def readable(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words: the key, what is wrong, and the value."""
    # The config names neither one reward nor the form of a checker.
    parts = error["loc"][error["loc"][:2] == ("reward", "reward") :]
    where = ".".join(cut(part) for part in parts).replace("checker.name", "checker")
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f", got {short(error['input'])}"
    return f"{where}{': ' if where else ''}{message}{given}"
