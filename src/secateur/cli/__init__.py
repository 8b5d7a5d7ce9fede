"""The command line: one module per command; options come from the configuration's sections."""

from secateur.cli.app import main

__all__ = ["main"]
