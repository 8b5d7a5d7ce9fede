"""Batches halfway through two networks, held in memory or, beyond a bound, in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.errors import WriteError
from secateur.graph.interpreter import GraphInterpreter


@dataclass(eq=False)
class CachedBatch:
    """A batch on its way through the original network and through the cut one."""

    full: GraphInterpreter
    cut: GraphInterpreter
    indices: Int[Tensor, "image"]
    """Of the images to count, which are the first ones of the batch."""
    notes: list[tuple[Tensor, ...]] = field(default_factory=list)
    """What was kept of it for another look."""

    def values(self) -> list[object]:
        """All that it holds."""
        return [self.full.values(), self.cut.values(), self.notes]


class ActivationCache:
    """Passages, of which those beyond a bound wait in files until it is their turn.

    A context manager: the files go in the end.
    """

    def __init__(self, bound_bytes: int) -> None:
        self._bound = bound_bytes
        self._passages: list[CachedBatch] = []
        self._sizes: list[int] = []
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-")

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def append(self, passage: CachedBatch) -> None:
        """Takes one more in."""
        self._passages.append(passage)
        self._sizes.append(0)
        self._settle(len(self._passages) - 1)

    def __len__(self) -> int:
        return len(self._passages)

    def __iter__(self) -> Iterator[CachedBatch]:
        for number, passage in enumerate(self._passages):
            self._fetch(number)
            yield passage
            self._settle(number)

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.pt"

    def _settle(self, number: int) -> None:
        """Leaves a passage in memory if there is room for it, next to those that are there."""
        passage = self._passages[number]
        size = _bytes_of(passage.values())
        if sum(self._sizes) + size <= self._bound:
            self._sizes[number] = size
            return
        # One call for all, so that values that share memory still do when they come back.
        try:
            torch.save(passage.values(), self._file(number))
        except (OSError, RuntimeError) as error:  # torch makes the latter of a full disk
            reason = " ".join(str(error).split())
            raise WriteError(
                f"{self._folder.name} can't hold what waits for its turn there: {reason}. TMPDIR "
                "names another disk"
            ) from error
        passage.full.set_values([])
        passage.cut.set_values([])
        passage.notes = []

    def _fetch(self, number: int) -> None:
        passage = self._passages[number]
        self._sizes[number] = 0
        if self._file(number).exists():
            full, cut, passage.notes = torch.load(self._file(number), weights_only=True)
            passage.full.set_values(full)
            passage.cut.set_values(cut)
            self._file(number).unlink()


def _bytes_of(values: object) -> int:
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())
