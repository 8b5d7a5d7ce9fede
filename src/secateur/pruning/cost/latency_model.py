"""Predict the latency of a cut network from the times of its layers at some widths.

Three terms add up: the times of convolutions and linear layers, interpolated between the widths
that `latency_profiler` timed and multiplied by a factor for the whole network; a constant; and a
term proportional to the number of values that all other operations write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.config import EngineName
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed
from secateur.graph.tensor_sizes import Dimension, TensorSizes
from secateur.runtime.errors import UsageError
from secateur.runtime.schema import VersionedRecord, parse_record

SCHEMA_VERSION = 3
SMALL = 16
"""Up to this many channels, time is linear between timed widths, whatever the block."""

Widths = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class Hardware(VersionedRecord):
    """The machine and settings that the times are valid for."""

    processor: str
    threads: int
    device: str
    dtype: str
    engine: EngineName
    version: str
    """Of the engine."""


class LayerTimes(VersionedRecord):
    """Times of one layer on its own."""

    layer: str
    read: tuple[int, ...]
    """Timed numbers of input channels, rising."""
    produced: tuple[int, ...]
    """Timed numbers of output channels, rising."""
    ms: tuple[tuple[float, ...], ...]
    """`[read][produced]`."""


class LatencyTable(VersionedRecord):
    """Times of a network's layers on one machine, in milliseconds per batch."""

    schema_version: int = SCHEMA_VERSION
    hardware: Hardware
    batch: int
    """Images in the batch."""
    block: int
    """Channels that the machine computes at once: a width costs as much as the next multiple."""
    layers: tuple[LayerTimes, ...]
    """In the order of `DependencyGraph.layers`."""
    layers_factor: float
    """Factor on the sum of the layers' times in the whole network; 1 or more."""
    fixed_ms: float
    """Constant part of the time of everything besides layers."""
    ms_per_value: float
    """Its other part, per value that is written for an image."""

    def to_json(self) -> str:
        """Return the table as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """Return the table that `to_json` wrote; raises `RunFolderError` for any other text."""
        return parse_record(LatencyTable, text, SCHEMA_VERSION, "the latency table")


@dataclass(frozen=True, eq=False)
class LayerWidths:
    """The numbers of channels that the time of a layer depends on."""

    read: Dimension
    """Input channels that it sums over; 1 if these are the same channels as those produced, as
    in a depthwise convolution."""
    produced: Dimension
    """Output channels."""
    position_channels: tuple[Dimension, ...]
    """Channels that are positions to the layer: its time is proportional to them."""


def widths_of(dependencies: DependencyGraph) -> list[LayerWidths]:
    """Return the widths of each layer, in the order of `DependencyGraph.layers`."""
    channel_of = dependencies.channel_of
    read = {consumer.node: channel_of[consumer.channels] for consumer in dependencies.consumers}

    def widths(layer: Layer) -> LayerWidths:
        inputs = read.get(layer.node, 1)
        outputs = 1 if layer.produced is None else channel_of[layer.produced]
        if is_prunable(inputs) and is_prunable(outputs):
            shared = np.intersect1d(inputs, outputs)
            if (shared != NOT_PRUNABLE).any():
                inputs = 1
        return LayerWidths(
            inputs, outputs, tuple(channel_of[ids] for ids in layer.position_channels)
        )

    return [widths(layer) for layer in dependencies.layers]


def is_prunable(dimension: Dimension) -> bool:
    """Return whether channels along a dimension can be removed."""
    return not isinstance(dimension, int) and bool((dimension != NOT_PRUNABLE).any())


def predict_milliseconds(
    table: LatencyTable,
    dependencies: DependencyGraph,
    other_values: Callable[[Removed], float],
) -> Callable[[Removed], float]:
    """Return a function of the removed channels: the predicted latency of the network.

    `other_values` counts the values that everything besides layers writes
    (`memory.count_other_values`). Raises `UsageError` if the table is another network's.
    """
    layers = layers_ms(dependencies, table.layers, table.block)
    return lambda removed: (
        table.layers_factor * float(layers(removed).sum())
        + table.fixed_ms
        + table.ms_per_value * other_values(removed)
    )


def layers_ms(
    dependencies: DependencyGraph, layers: Sequence[LayerTimes], block: int
) -> Callable[[Removed], Numbers]:
    """Return a function of the removed channels: the time of each layer.

    Raises `UsageError` if `layers` are another network's.
    """
    if [times.layer for times in layers] != [layer.name for layer in dependencies.layers]:
        raise UsageError("the latency table is of another network: its layers have other names")
    groups, widths = dependencies.groups, widths_of(dependencies)
    read = TensorSizes(groups, [(layer.read,) for layer in widths])
    produced = TensorSizes(groups, [(layer.produced,) for layer in widths])
    over = TensorSizes(groups, [layer.position_channels for layer in widths])
    whole = over({})
    interpolate = Interpolation(layers, block)
    return lambda removed: interpolate(read(removed), produced(removed)) * (over(removed) / whole)


class Interpolation:
    """Interpolates the times of all layers at once, between the widths that were timed."""

    def __init__(self, layers: Sequence[LayerTimes], block: int) -> None:
        self._block = block
        self._layer = np.arange(len(layers))
        self._read = self._grid([times.read for times in layers])
        self._produced = self._grid([times.produced for times in layers])
        self._ms = np.zeros((len(layers), self._read.shape[1], self._produced.shape[1]))
        for number, times in enumerate(layers):
            self._ms[number, : len(times.read), : len(times.produced)] = times.ms

    def _grid(self, timed: Sequence[Sequence[int]]) -> Numbers:
        """Return `[layer, point]`: timed widths, padded to blocks; infinite after the last."""
        grid = np.full((len(timed), 1 + max(map(len, timed), default=0)), np.inf)
        for number, row in enumerate(timed):
            grid[number, : len(row)] = padded(np.array(row), self._block)
        return grid

    def __call__(self, read: Widths, produced: Widths) -> Numbers:
        """Return `[layer]`: milliseconds at these numbers of input and output channels."""
        i, x = self._place(self._read, read)
        j, y = self._place(self._produced, produced)
        layer, ms = self._layer, self._ms
        narrow = ms[layer, i, j] * (1 - y) + ms[layer, i, j + 1] * y
        wide = ms[layer, i + 1, j] * (1 - y) + ms[layer, i + 1, j + 1] * y
        result: Numbers = narrow * (1 - x) + wide * x
        return result

    def _place(self, grid: Numbers, widths: Widths) -> tuple[Widths, Numbers]:
        """Return the place of the timed width below, and how far it is to the next one, 0 to 1."""
        width = padded(widths, self._block)
        below = np.maximum((grid <= width[:, None]).sum(axis=1) - 1, 0)
        start, end = grid[self._layer, below], grid[self._layer, below + 1]
        return below, np.clip((width - start) / (end - start), 0, 1)


def padded(width: Widths, block: int) -> Numbers:
    """Return the widths that the machine computes with."""
    return np.where(width <= SMALL, width, np.ceil(width / block) * block)
