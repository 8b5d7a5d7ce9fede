"""Report progress through long loops; the caller decides whether and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


@runtime_checkable
class ProgressCallback(Protocol):
    """Pass items through, and show how many are done and how long the rest will take."""

    def __call__(self, items: Iterable[T], title: str, total: int) -> Iterable[T]:
        """Return the items, unchanged; `total` is their number."""


def no_progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """Show nothing: a `ProgressCallback`."""
    del title, total
    return items


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed"
        )


def progress_bars(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Show a bar on stderr, with the rate and the remaining time: a `ProgressCallback`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task)
