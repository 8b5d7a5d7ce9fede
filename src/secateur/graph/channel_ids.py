"""Channel ids on their way through the graph.

Every dimension of every parameter gets ids of its own; each operation has a rule (`rules`) that
says how the ids of what it reads become those of what it writes, which ids it ties and which it
freezes.
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
"""Channel ids along each dimension of a tensor; None where the size never changes."""
Count = Callable[[Ids | None, int], int]
"""How many of some channels stay in a cut network; without ids the given size."""
Resize = Callable[[Count], Mapping[int, Any]]
"""The arguments of an operation that change when channels go, by position."""


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
    """A convolution or linear layer as it is counted."""

    name: str
    weight: str
    """Parameter that the kernel is, or is computed from."""
    is_computed: bool
    """Whether the forward makes the kernel from the parameter, as in weight standardisation."""
    produced: Ids | None
    """Channels of its answer."""
    filter_dim: int
    """Dimension of the kernel that its filters, which write the channels, lie along."""
    positions: int
    """Positions an image at which the kernel is applied, to each of the channels `over`."""
    over: tuple[Ids, ...]
    """Channels along dimensions that are positions to this layer, as in token mixing."""
    node: Node
    kernel: Axes
    """Ids along each dimension of the kernel."""
    shape: tuple[int, ...]

    def macs(self, count: Count) -> int:
        """Multiply-accumulates for one image."""
        sizes = (count(ids, size) for ids, size in zip(self.kernel, self.shape, strict=True))
        return self.positions * math.prod(count(ids, 0) for ids in self.over) * math.prod(sizes)
