"""How long a cut network takes, predicted from times of its layers at some widths.

The time of a network is that of its convolutions and linear layers, interpolated between the widths
they were timed at (`timing`), times a factor for what a whole network is slower or faster by, and a
remainder that is a straight line in the number of values that all other operations write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.errors import UsageError
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed
from secateur.pruning.cost.memory import storages
from secateur.pruning.cost.tensor_sizes import Dimension, TensorSizes
from secateur.runtime.schema import VersionedRecord, parse_record

SCHEMA_VERSION = 2
SMALL = 16
"""Up to so many channels time is a straight line between timed widths, whatever the block."""

Widths = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class Hardware(VersionedRecord):
    """What the times hold for."""

    processor: str
    threads: int
    device: str
    dtype: str
    torch: str


class LayerTimes(VersionedRecord):
    """Times of one layer, alone."""

    layer: str
    read: tuple[int, ...]
    """Channels that it reads, rising."""
    produced: tuple[int, ...]
    """Channels that it writes, rising."""
    ms: tuple[tuple[float, ...], ...]
    """`[read][written]`."""


class LatencyTable(VersionedRecord):
    """Times of a network's layers on one machine; all times are in milliseconds a batch."""

    schema_version: int = SCHEMA_VERSION
    hardware: Hardware
    batch: int
    """Images in the batch."""
    block: int
    """Channels that the machine computes at once: a width takes as long as the next multiple."""
    layers: tuple[LayerTimes, ...]
    """In the order of `DependencyGraph.layers`."""
    layers_factor: float
    """What the sum of the layers' times is multiplied by in the whole network; 1 or more."""
    fixed_ms: float
    ms_per_value: float
    """Both: what everything besides layers takes, by the values that it writes for an image."""

    def to_json(self) -> str:
        """The table as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """The table that `to_json` wrote; raises `RunFolderError` where the text is none."""
        return parse_record(LatencyTable, text, SCHEMA_VERSION, "the latency table")


@dataclass(frozen=True, eq=False)
class LayerWidths:
    """The two numbers of channels that the time of a layer depends on."""

    read: Dimension
    """Channels that it sums over; 1 where they can't be distinguished from those `produced`."""
    produced: Dimension
    over: tuple[Dimension, ...]
    """Channels that are positions to it: time is in proportion to them."""


def widths_of(dependencies: DependencyGraph) -> list[LayerWidths]:
    """The widths of each layer, in the order of `DependencyGraph.layers`."""
    read = {
        reader.node: dependencies.channel_of[reader.channels] for reader in dependencies.consumers
    }

    def widths(layer: Layer) -> LayerWidths:
        written = 1 if layer.produced is None else dependencies.channel_of[layer.produced]
        before = read.get(layer.node, 1)
        if is_prunable(before) and is_prunable(written):
            together = np.intersect1d(before, written)
            if (together != NOT_PRUNABLE).any():
                before = 1
        return LayerWidths(
            before, written, tuple(dependencies.channel_of[ids] for ids in layer.over)
        )

    return [widths(layer) for layer in dependencies.layers]


def is_prunable(dimension: Dimension) -> bool:
    """Whether channels along a dimension can go."""
    return not isinstance(dimension, int) and bool((dimension != NOT_PRUNABLE).any())


def milliseconds(table: LatencyTable, dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """A function of what goes: how long the network that is left takes.

    Raises `UsageError` where the table is another network's.
    """
    layers = layers_ms(dependencies, table.layers, table.block)
    values = other_values(dependencies)
    return lambda removed: (
        table.layers_factor * float(layers(removed).sum())
        + table.fixed_ms
        + table.ms_per_value * values(removed)
    )


def layers_ms(
    dependencies: DependencyGraph, layers: Sequence[LayerTimes], block: int
) -> Callable[[Removed], Numbers]:
    """A function of what goes: the time of each layer; raises `UsageError` as `milliseconds`."""
    if [times.layer for times in layers] != [layer.name for layer in dependencies.layers]:
        raise UsageError("the latency table is of another network: its layers have other names")
    each = widths_of(dependencies)
    read = TensorSizes(dependencies, [(widths.read,) for widths in each])
    written = TensorSizes(dependencies, [(widths.produced,) for widths in each])
    over = TensorSizes(dependencies, [widths.over for widths in each])
    whole = over({})
    interpolate = Interpolation(layers, block)
    return lambda removed: interpolate(read(removed), written(removed)) * (over(removed) / whole)


class Interpolation:
    """Times of layers between the widths that they were timed at, for all layers at once."""

    def __init__(self, layers: Sequence[LayerTimes], block: int) -> None:
        self._block = block
        self._layer = np.arange(len(layers))
        self._read = self._grid([times.read for times in layers])
        self._written = self._grid([times.produced for times in layers])
        self._ms = np.zeros((len(layers), self._read.shape[1], self._written.shape[1]))
        for number, times in enumerate(layers):
            self._ms[number, : len(times.read), : len(times.produced)] = times.ms

    def _grid(self, timed: Sequence[Sequence[int]]) -> Numbers:
        """`[layer, point]`: timed widths as the machine computes them; infinite after the last."""
        grid = np.full((len(timed), 1 + max(map(len, timed), default=0)), np.inf)
        for number, row in enumerate(timed):
            grid[number, : len(row)] = padded(np.array(row), self._block)
        return grid

    def __call__(self, read: Widths, written: Widths) -> Numbers:
        """`[layer]`: milliseconds where each layer reads and writes so many channels."""
        i, x = self._place(self._read, read)
        j, y = self._place(self._written, written)
        layer, ms = self._layer, self._ms
        narrow = ms[layer, i, j] * (1 - y) + ms[layer, i, j + 1] * y
        wide = ms[layer, i + 1, j] * (1 - y) + ms[layer, i + 1, j + 1] * y
        result: Numbers = narrow * (1 - x) + wide * x
        return result

    def _place(self, grid: Numbers, widths: Widths) -> tuple[Widths, Numbers]:
        """Number of the timed width below, and the share of the way to the next one."""
        width = padded(widths, self._block)
        below = np.maximum((grid <= width[:, None]).sum(axis=1) - 1, 0)
        start, end = grid[self._layer, below], grid[self._layer, below + 1]
        return below, np.clip((width - start) / (end - start), 0, 1)


def padded(width: Widths, block: int) -> Numbers:
    """The widths that the machine computes with."""
    return np.where(width <= SMALL, width, np.ceil(width / block) * block)


def other_values(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """A function of what goes: values that all but layers write for an image."""
    layers = {layer.node for layer in dependencies.layers} | {dependencies.graph.image}
    each = [storage for storage in storages(dependencies) if storage.node not in layers]
    volumes = TensorSizes(dependencies, [storage.dimensions for storage in each])
    images = np.array([storage.images for storage in each], dtype=np.int64)
    return lambda removed: float((volumes(removed) // images).sum())
