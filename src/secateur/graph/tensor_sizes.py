"""Sizes of tensors in a cut network: products of numbers of channels, for many tensors at once.

An allocation needs sizes thousands of times. So everything that does not depend on the cut is
computed once, dimensions that several tensors share are counted once, and so are those that a cut
leaves as the one before it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from secateur.graph.channel_ids import Axes, Ids, index_table
from secateur.graph.groups import Group

Dimension = Ids | int
"""Prunable channel of each index, negative if the index must stay; or a size that never
changes."""


class TensorSizes:
    """Numbers of elements, `[tensor]`, for any channels that are removed from the groups."""

    def __init__(self, groups: Mapping[str, Group], tensors: Iterable[Sequence[Dimension]]) -> None:
        """Take the dimensions of each tensor."""
        number: dict[bytes, int] = {}
        counted: list[Ids] = []
        factors: list[list[int]] = []
        constants: list[int] = []
        for dimensions in tensors:
            factors.append([])
            constants.append(1)
            for dimension in dimensions:
                if isinstance(dimension, int):
                    constants[-1] *= dimension
                elif (dimension < 0).all():
                    constants[-1] *= len(dimension)
                else:
                    key = dimension.tobytes()
                    if key not in number:
                        number[key] = len(counted)
                        counted.append(dimension)
                    factors[-1].append(number[key])
        self._constants = np.array(constants, dtype=np.int64)
        widest = max(map(len, factors), default=0)
        # Missing factors are the last one, which is 1.
        padded = [[*row, *[len(counted)] * (widest - len(row))] for row in factors]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(factors), widest)
        self._lengths = np.array([*map(len, counted), 1], dtype=np.int64)
        self._copies = _copies(groups, counted)
        self._removed: dict[str, Sequence[int]] = dict.fromkeys(groups, ())
        """Removed channels that are not in `_lengths`, which stand for the last cut."""

    def __call__(self, removed: Mapping[str, Sequence[int]]) -> npt.NDArray[np.int64]:
        """Return the numbers of elements without `removed` channels of each group."""
        for name, before in self._removed.items():
            numbers = removed.get(name, ())
            if numbers is before and isinstance(numbers, tuple):
                continue
            dimensions, copies = self._copies[name]
            less = copies[list(numbers)].sum(0) - copies[list(before)].sum(0)
            self._lengths[dimensions] -= less
            self._removed[name] = tuple(numbers)
        result: npt.NDArray[np.int64] = self._constants * self._lengths[self._factors].prod(axis=1)
        return result


def _copies(groups: Mapping[str, Group], dimensions: Sequence[Ids]) -> dict[str, tuple[Ids, Ids]]:
    """Return for each group the dimensions it lies along, and `[channel, dimension]`: how often."""
    channels = np.concatenate([np.zeros(0, np.int64), *(g.channels for g in groups.values())])
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    table = index_table(channels, int(channels.max(initial=-1)) + 1)
    start = np.searchsorted(owner, np.arange(len(groups)))
    members: list[list[tuple[int, Ids]]] = [[] for _ in groups]
    for number, dimension in enumerate(dimensions):
        places = table[dimension]
        places = places[places >= 0]
        for group in np.unique(owner[places]).tolist():
            mine = places[owner[places] == group] - start[group]
            members[group].append((number, mine))
    copies_of = {}
    for (name, group), along in zip(groups.items(), members, strict=True):
        counts = [np.bincount(mine, minlength=len(group)) for _, mine in along]
        copies = np.array(counts, dtype=np.int64).reshape(len(along), len(group)).T
        copies_of[name] = (np.array([number for number, _ in along], dtype=np.int64), copies.copy())
    return copies_of


def dimensions_of(channel_of: Ids, axes: Axes, shape: Iterable[int]) -> tuple[Dimension, ...]:
    """Return the dimensions of a tensor from the ids along its `axes`, or its sizes without ids.

    `channel_of` gives the prunable channel of each id (`DependencyGraph.channel_of`).
    """
    return tuple(
        int(size) if ids is None else channel_of[ids] for ids, size in zip(axes, shape, strict=True)
    )
