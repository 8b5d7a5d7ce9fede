"""Consoles of the command line: results go to stdout, the rest to stderr."""

from __future__ import annotations

from rich.console import Console


def out() -> Console:
    """Return the console of results."""
    return Console()


def err() -> Console:
    """Return the console of messages: stderr, one line however long."""
    return Console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of the result."""
    out().print(escaped(text), soft_wrap=True, highlight=False)


def show_error(text: str) -> None:
    """Print an error as one line on stderr."""
    err().print(f"[bold red]error:[/] {escaped(text)}")


def show_note(text: str) -> None:
    """Print a note as one line on stderr."""
    err().print(f"[yellow]note:[/] {escaped(text)}", highlight=False)


def escaped(text: str) -> str:
    """Return text from outside such that rich does not read its brackets as style."""
    return text.replace("[", r"\[")
