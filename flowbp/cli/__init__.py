"""The command line `flowbp`."""

from flowbp.cli import sweep  # noqa: F401  (a command of its own module)
from flowbp.cli.commands import app, main

__all__ = ["app", "main"]
