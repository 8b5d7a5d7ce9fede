"""The tensors of a checkpoint, from dicts in dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEPTH, MOST_DICTS = 32, 20_000
"""Levels of dicts and lists in each other, and how many of them are looked at."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    place: tuple[str, ...]
    """Keys of the dict that it is in, divided at their dots."""
    name: str
    """Its key there, a dotted name in the state dict."""
    tensor: Tensor

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the whole name."""
        return (*self.place, *self.name.split("."))


@dataclass(frozen=True, eq=False)
class Contents:
    """The tensors of a checkpoint."""

    entries: tuple[Entry, ...]

    def below(self, key: str) -> Contents:
        """Return what lies below a key or a prefix, which may itself lie below others."""
        wanted = tuple(key.split("."))
        starts = [entry for entry in self.entries if entry.parts[: len(wanted)] == wanted]
        inner = [entry for entry in self.entries if _contains(entry.parts, wanted)]
        return Contents(tuple(starts or inner))

    def keys(self) -> list[str]:
        """Return the keys under which there are tensors."""
        return sorted({".".join(entry.place) for entry in self.entries})


def _contains(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    length = len(wanted)
    return any(parts[start : start + length] == wanted for start in range(len(parts) - length))


def read_contents(content: Any) -> Contents:
    """Return the tensors, and NumPy's arrays as tensors, in nested dicts and lists.

    Raises `ValueError` if there is no end of them.
    """
    entries: list[Entry] = []
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    count = 0
    while pending:
        count += 1
        place, values = pending.pop()
        if len(place) > DEPTH or count > MOST_DICTS:
            raise ValueError("its dicts nest too deeply")
        inner = []
        for key, value in _items(values):
            if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            if isinstance(value, Tensor):
                entries.append(Entry(place, str(key), value.detach()))
            elif isinstance(value, Mapping | list | tuple):
                inner.append(((*place, *str(key).split(".")), value))
        pending += reversed(inner)
    return Contents(tuple(entries))


def _items(values: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(values, Mapping):
        return values.items()
    return enumerate(values) if isinstance(values, list | tuple) else ()
