"""The command line `flowbp`."""

from flowbp.cli.commands import app, main

__all__ = ["app", "main"]
