"""What runs: the versions of flowbp and of the libraries under it, and the device."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch

import flowbp

ENVIRONMENT = "environment.json"


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def environment() -> dict[str, Any]:
    """What ran: flowbp's version and commit, the libraries and the device."""
    from flowbp_kernels.bench import machine

    about = machine("cuda" if torch.cuda.is_available() else "cpu")
    libraries = about["versions"] | versions("diffusers", "transformers")
    return {"flowbp": flowbp.__version__, "commit": about["commit"], **libraries, "device": about["device"]}


def describe_environment(about: Mapping[str, Any]) -> str:
    """One line of `environment`."""
    return ", ".join(f"{value}" if key == "device" else f"{key} {value}" for key, value in about.items() if value)
