"""Kinds of values in a config: what each may be. Numbers are finite wherever they stand (`registry.FINITE`)."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from flowbp.backbones import KNOWN_MODELS
from flowbp.config.registry import build_method, describe, unknown
from flowbp.given import cut, read_data

# The backends that torch registers itself, which it tells only after seconds of imports.
BACKENDS: list[str] = read_data(__file__, "backends.yaml")

PathLike = TypeVar("PathLike", str, Path)


def no_switch(value: Any) -> Any:
    """YAML reads yes, no, on and off as booleans, which would pass for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got the switch {str(value).lower()}")
    return value


def expanded(value: PathLike) -> PathLike:
    """`value` with ~ and environment variables replaced. Raises ValueError where one of them is unknown, and for a
    text that is too long for a path.
    """
    text = os.path.expandvars(os.path.expanduser(str(value)))
    if text.startswith("~") or "$" in text:
        raise ValueError(f"{cut(text)} names a user or a variable that is not known here: write the path out")
    if len(text) > 1000:
        raise ValueError(f"{cut(text)} has more than 1000 characters")
    return type(value)(text)


def located(value: str) -> str:
    """The absolute path of a file or folder that is there, so that a stored config means it from any working folder.

    Every other value stays, such as a model's name or an id on the Hub.
    """
    known = os.path.isdir(value) and value in ("shapes", "shapes-monitor", *KNOWN_MODELS)
    return os.path.abspath(value) if os.path.exists(value) and not known else value


def known_backend(name: str) -> str:
    known = {*BACKENDS, *importlib.metadata.entry_points(group="torch_dynamo_backends").names}
    if dynamo := sys.modules.get("torch._dynamo"):  # where one's own may be registered; importing it takes seconds
        known |= set(dynamo.list_backends(exclude_tags=None))
    if name not in known:
        raise unknown("compile backend", name, known)
    return name


Number = BeforeValidator(no_switch)
# What takes memory has a bound that no run comes near, so that a slip of the keyboard is told before it is allocated.
Whole = Annotated[int, Number, Field(ge=0, le=10**9)]
Count = Annotated[int, Number, Field(ge=1, le=10**9)]  # of what comes one after the other
Size = Annotated[int, Number, Field(ge=1, le=10**4)]  # of what is there at once
Samples = Annotated[int, Number, Field(ge=1, le=10**6)]
Steps = Annotated[int, Number, Field(ge=1, le=1000)]  # of a rollout
Seed = Annotated[int, Number, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Number, Field(ge=8, le=2**14, multiple_of=8)]
Real = Annotated[float, Number]
Positive = Annotated[float, Number, Field(gt=0)]
NonNegative = Annotated[float, Number, Field(ge=0)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Decay = Annotated[float, Number, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
Place = Annotated[Text, AfterValidator(located)]
Folder = Annotated[Path, AfterValidator(expanded)]
Cache = Annotated[Folder, AfterValidator(Path.absolute)]
MetricName = Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=80)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
Backend = Annotated[str, AfterValidator(known_backend)]
Levels = Literal["published", "pipeline"]
Bits = Literal["nf4", "int8", "float8"]
OfWeights = BeforeValidator(lambda v: {"weights": v} if isinstance(v, str) else v)
Kernels = Annotated[Literal["auto", "off"], BeforeValidator(lambda v: "off" if v is False else v)]  # as YAML reads off
Shards = Annotated[Literal[False, "node", "all"], BeforeValidator(lambda v: "all" if v is True else v)]  # true: all
MethodField = Annotated[
    Any,
    BeforeValidator(lambda spec, info: build_method(spec, info.context)),  # `load` says what it may import
    PlainSerializer(describe),
]
