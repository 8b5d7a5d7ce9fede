"""Activations of batches halfway through two networks, in memory or in temporary files.

On an accelerator they stay there as far as half of its free memory goes; the rest moves to the
host's memory, up to a limit, and only then to files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import GraphInterpreter
from secateur.runtime.device import CPU
from secateur.runtime.errors import WriteError
from secateur.runtime.memory import USABLE_FRACTION, free_bytes
from secateur.runtime.torch_internals import storage_key, tree_leaves, tree_map


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
    starts: dict[str, tuple[GraphInterpreter, GraphInterpreter]] = field(default_factory=dict)
    """Both networks where the layers around a group begin, by group."""

    def values(self) -> list[Any]:
        """Return everything that the batch holds."""
        starts = [[part.values() for part in pair] for pair in self.starts.values()]
        return [self.full.values(), self.cut.values(), self.targets, starts]

    def set_values(self, values: Sequence[Any]) -> None:
        """Replace everything that the batch holds by what `values` returned."""
        full, cut, self.targets, starts = values
        self.full.set_values(full)
        self.cut.set_values(cut)
        for pair, kept in zip(self.starts.values(), starts, strict=True):
            for part, part_values in zip(pair, kept, strict=True):
                part.set_values(part_values)


class ActivationCache:
    """Cached batches; those that exceed the limits of memory are kept in files between uses.

    It is a context manager that deletes the files at its end.
    """

    def __init__(self, limit_bytes: int, device: torch.device = CPU) -> None:
        """Hold batches of networks on `device`, with `limit_bytes` of the host's memory."""
        self._device = device
        self._limits = {CPU: limit_bytes}
        if device != CPU:
            self._limits = {device: int(USABLE_FRACTION * free_bytes(device)), **self._limits}
        self._batches: list[CachedBatch] = []
        self._stored: list[tuple[torch.device, int]] = []
        """Where each batch is held in memory, and its bytes there; 0 if in a file or in use."""
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
        self._stored.append((CPU, 0))
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
        """Hold a batch where it fits beside those that are there, else write a file."""
        batch = self._batches[number]
        for place, limit in self._limits.items():
            if place != self._device:
                batch.set_values(_moved(batch.values(), place))
            size = _bytes_of(batch.values())
            if size + sum(stored for at, stored in self._stored if at == place) <= limit:
                self._stored[number] = place, size
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
        batch.set_values(([], [], [], [([], []) for _ in batch.starts]))

    def _load(self, number: int) -> None:
        batch = self._batches[number]
        self._stored[number] = CPU, 0
        if self._file(number).exists():
            batch.set_values(torch.load(self._file(number), weights_only=True))
            self._file(number).unlink()
        if self._device != CPU:
            batch.set_values(_moved(batch.values(), self._device))


def _moved(values: list[Any], device: torch.device) -> list[Any]:
    """Return values with their tensors on a device, each tensor once."""
    moved: dict[tuple[object, ...], Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        key = (storage_key(leaf), leaf.dtype, leaf.storage_offset(), leaf.shape, leaf.stride())
        if key not in moved:
            moved[key] = leaf.to(device)
        return moved[key]

    result: list[Any] = tree_map(move, values)
    return result


def _bytes_of(values: object) -> int:
    storages = {
        storage_key(leaf): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())
