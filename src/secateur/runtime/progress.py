"""How long work tells of itself; whoever asks for it decides whether that is shown."""

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
    """Passes items through and may show how far they are, and how long the rest will take."""

    def __call__(self, items: Iterable[T], title: str, total: int) -> Iterable[T]:
        """The items, unchanged; `total` is how many there will be."""


def no_progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """A `Track` that shows nothing."""
    del title, total
    return items


class _Rate(ProgressColumn):
    """How many steps a second."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed"
        )


def progress_bars(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """A `Track` that shows a bar on stderr, with the rate and the time left."""
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
