"""Activations of batches halfway through two networks, in memory or in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import GraphInterpreter
from secateur.runtime.errors import WriteError
from secateur.runtime.torch_internals import tree_leaves


@dataclass(eq=False)
class CachedBatch:
    """A batch on its way through the original network and through the cut one."""

    full: GraphInterpreter
    cut: GraphInterpreter
    indices: Int[Tensor, "image"]
    """Numbers of the images to count, which come first in the batch."""
    positions: dict[Node, Tensor] = field(default_factory=dict)
    """Positions of layers that are not evenly spaced, `[row, position]`."""
    targets: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Regression targets of the current layer, kept for its further passes."""

    def values(self) -> list[object]:
        """Return everything that the batch holds."""
        return [self.full.values(), self.cut.values(), self.targets]


class ActivationCache:
    """Cached batches; those that exceed a memory limit are kept in files between uses.

    It is a context manager that deletes the files at its end.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._batches: list[CachedBatch] = []
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

    def append(self, batch: CachedBatch) -> None:
        """Add a batch."""
        self._batches.append(batch)
        self._sizes.append(0)
        self._store(len(self._batches) - 1)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[CachedBatch]:
        for number, batch in enumerate(self._batches):
            self._load(number)
            yield batch
            self._store(number)

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.pt"

    def _store(self, number: int) -> None:
        """Leave a batch in memory if it fits beside those that are there, else write a file."""
        batch = self._batches[number]
        size = _bytes_of(batch.values())
        if sum(self._sizes) + size <= self._limit:
            self._sizes[number] = size
            return
        # One call for all, so that tensors that share memory still do when they are loaded.
        try:
            torch.save(batch.values(), self._file(number))
        except (OSError, RuntimeError) as error:  # torch raises the latter if the disk is full
            reason = " ".join(str(error).split())
            raise WriteError(
                f"activations can't be written to {self._folder.name}: {reason}; set TMPDIR to a "
                "folder on another disk"
            ) from error
        batch.full.set_values([])
        batch.cut.set_values([])
        batch.targets = []

    def _load(self, number: int) -> None:
        batch = self._batches[number]
        self._sizes[number] = 0
        if self._file(number).exists():
            full, cut, batch.targets = torch.load(self._file(number), weights_only=True)
            batch.full.set_values(full)
            batch.cut.set_values(cut)
            self._file(number).unlink()


def _bytes_of(values: object) -> int:
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())
