"""The command line."""

from secateur.cli.app import main

__all__ = ["main"]
