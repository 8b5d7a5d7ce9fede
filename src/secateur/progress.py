"""How long work tells of itself; the command line decides whether that is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """Passes items through and may show how far they are, and how long the rest will take."""

    def __call__(self, items: Iterable[T], title: str, total: int) -> Iterable[T]:
        """The items, unchanged; `total` is how many there will be."""


def silent(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """A `Track` that shows nothing."""
    del title, total
    return items
