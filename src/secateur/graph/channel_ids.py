"""Channel ids: numbers that follow each channel through the network, and the layers that use them.

Every dimension of every parameter gets ids of its own (`propagation`). Ids that turn out to be
coupled are one channel (`coupling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx.node import Node

Ids = npt.NDArray[np.int64]
Axes = tuple[Ids | None, ...]
"""Channel ids along each dimension of a tensor; None for a dimension whose size never changes."""
Count = Callable[[Ids | None, int], int]
"""Returns how many of these ids stay in a cut network; if ids are None, the given size."""
Resize = Callable[[Count], Mapping[int, Any]]
"""Returns the arguments of an operation that change with a cut, by position."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """A convolution or linear layer that sums over channels."""

    layer: str
    node: Node
    dim: int
    """Dimension of the node's first input along which the channels lie."""
    channels: Ids


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a convolution or linear layer: the channels it produces, and its cost."""

    name: str
    weight: str
    """Parameter that the kernel is, or is computed from."""
    is_computed: bool
    """Whether `forward` computes the kernel from the parameter, as in weight standardisation."""
    produced: Ids | None
    """Ids of its output channels."""
    filter_dim: int
    """Dimension of the kernel that the filters lie along."""
    positions: int
    """Positions per image at which the kernel is applied, for each of `position_channels`."""
    position_channels: tuple[Ids, ...]
    """Ids along dimensions that this layer treats as positions, as in token mixing."""
    node: Node
    kernel_node: Node
    kernel: Axes
    """Ids along each dimension of the kernel."""
    shape: tuple[int, ...]

    def macs(self, count: Count) -> int:
        """Return the multiply-accumulates for one image."""
        sizes = (count(ids, size) for ids, size in zip(self.kernel, self.shape, strict=True))
        positions = self.positions * math.prod(count(ids, 0) for ids in self.position_channels)
        return positions * math.prod(sizes)


def index_table(channels: Ids, id_count: int) -> Ids:
    """Return `[id]`: the index of each id in `channels`, -1 for others; one more entry is -1.

    The entry at the end is what the index -1 (not prunable) finds.
    """
    table = np.full(id_count + 1, -1, dtype=np.int64)
    table[channels] = np.arange(len(channels))
    return table
