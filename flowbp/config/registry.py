"""Constructors as configuration: a dataclass is built from a mapping of its fields, or from a name and fields."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from flowbp.active_sets import PAIR_SAMPLERS, PairSampler
from flowbp.given import find, nearest, short
from flowbp.methods import METHODS

FINITE = ConfigDict(allow_inf_nan=False)
NAMES = {cls: name for name, cls in (METHODS | PAIR_SAMPLERS).items()}


class ConfigError(ValueError):
    """A configuration that cannot be run. Its message names the key, the value and the way out."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    return ConfigError(f"unknown {kind} {short(name)}; {nearest(name, known)}known: {', '.join(known)}")


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """cls(**values) for a dataclass, each value validated against its field's type."""
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"{cls.__name__} key", key, fields)
        if hints[key] is PairSampler:
            if isinstance(value, Mapping) and dataclasses.is_dataclass(default := fields[key].default):
                value = {"name": describe(default)["name"]} | value  # fields alone: the default's
            arguments[key] = build_named("pair sampler", PAIR_SAMPLERS, value)
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            arguments[key] = build(hints[key], value)
        else:
            try:
                arguments[key] = TypeAdapter(hints[key], config=FINITE).validate_python(value)
            except ValidationError as error:
                raise ConfigError(f"{key} = {short(value)}: {error.errors()[0]['msg']}") from None
    missing = dataclasses.MISSING
    needed = [field.name for field in fields.values() if field.default is missing and field.default_factory is missing]
    if absent := [name for name in needed if name not in arguments]:
        raise ConfigError(f"{cls.__name__} needs {' and '.join(absent)} too: it has {', '.join(arguments) or 'none'}")
    return cls(**arguments)


def build_named(kind: str, registry: Mapping[str, type], spec: Any) -> Any:
    """Build from "name" or {name: ..., **fields}. A name "module:Class" imports a class of your own."""
    if dataclasses.is_dataclass(spec):
        return spec  # already built
    if not isinstance(spec, (str, Mapping)):
        raise ConfigError(f"{short(spec)} is no {kind}: give a name, or name and fields; known: {', '.join(registry)}")
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.pop("name", None)
    if isinstance(name, str) and ":" in name:
        cls = find(kind, name)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ConfigError(f"{kind} {short(name)} is {short(cls)}: name a dataclass")
        return build(cls, fields)
    if not isinstance(name, str) or name not in registry:
        raise unknown(kind, name, registry)
    return build(registry[name], fields)


def describe(built: Any) -> dict[str, Any]:
    """The inverse of `build_named`: {name: ..., **fields}."""
    if isinstance(built, Unimported):
        return built.spec
    described = {"name": NAMES.get(type(built), f"{type(built).__module__}:{type(built).__qualname__}")}
    for field in dataclasses.fields(built):
        value = getattr(built, field.name)
        described[field.name] = describe(value) if dataclasses.is_dataclass(value) else value
    return described


@dataclasses.dataclass(frozen=True)
class Unimported:
    """A method that a file describes by code of its author's, which only commands that run a method import."""

    spec: dict[str, Any]

    def plan(self, sigmas: Any, rng: Any) -> Any:
        """Raises ConfigError: the code would have to run."""
        code, way_out = ", ".join(own_code(self.spec)), f"to run it here, type it, such as method={self.spec['name']}"
        raise ConfigError(f"{code} is code that a file names, and reading it runs none: {way_out}")


def own_code(values: Any) -> list[str]:
    """All texts "module:attribute" in nested mappings."""
    if isinstance(values, Mapping):
        return [name for value in values.values() for name in own_code(value)]
    return [values] if isinstance(values, str) and ":" in values else []


def build_method(spec: Any, typed: Iterable[str] | None = None) -> Any:
    """The method that `spec` ("name" or {name: ..., **fields}) describes.

    typed: the code that may be imported; a method that needs other code is returned `Unimported`. None allows all.
    """
    fields = {"name": spec} if isinstance(spec, str) else spec
    if typed is not None and not set(own_code(fields)) <= set(typed) and isinstance(fields.get("name"), str):
        return Unimported(dict(fields))
    method = build_named("method", METHODS, spec)
    if not hasattr(method, "plan"):
        raise ConfigError(f"{short(spec)} is no method: it has no plan(sigmas, rng)")
    return method


def from_mapping(cls: type) -> BeforeValidator:
    """For a field of type `cls`: lets a config give it as a mapping of its fields."""
    return BeforeValidator(lambda value: build(cls, value) if isinstance(value, Mapping) else value)
