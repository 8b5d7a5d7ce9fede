"""Sizes of tensors in a cut network: products of numbers of channels, for many tensors at once.

An allocation needs sizes thousands of times. So everything that does not depend on the cut is
computed once, and dimensions that several tensors share are counted once.
"""

from __future__ import annotations

import itertools
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
        sizes = [len(group) for group in groups.values()]
        starts = itertools.accumulate(sizes, initial=0)
        self._start = dict(zip(groups, starts, strict=False))
        self._stays = np.ones(sum(sizes) + 1, dtype=bool)  # -1, the last, is never removed
        nothing = np.zeros(0, dtype=np.int64)
        channels = np.concatenate([nothing, *(group.channels for group in groups.values())])
        table = index_table(channels, int(channels.max(initial=-1)) + 1)
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
                        counted.append(table[dimension])
                    factors[-1].append(number[key])
        self._constants = np.array(constants, dtype=np.int64)
        self._places = np.concatenate([nothing, *counted])
        self._bounds = np.array([0, *itertools.accumulate(map(len, counted))], dtype=np.int64)
        widest = max(map(len, factors), default=0)
        # Missing factors are the last one, which is 1.
        padded = [[*row, *[len(counted)] * (widest - len(row))] for row in factors]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(factors), widest)

    def __call__(self, removed: Mapping[str, Sequence[int]]) -> npt.NDArray[np.int64]:
        """Return the numbers of elements without `removed` channels of each group."""
        lengths = [len(numbers) for numbers in removed.values()]
        flat = itertools.chain.from_iterable(removed.values())
        numbers = np.fromiter(flat, np.int64, sum(lengths))
        starts = np.array([self._start[name] for name in removed], dtype=np.int64)
        numbers += np.repeat(starts, lengths)
        stays = self._stays.copy()
        stays[numbers] = False
        counts = np.ones(len(self._bounds), dtype=np.int64)
        if len(self._places):
            counts[:-1] = np.add.reduceat(stays[self._places], self._bounds[:-1], dtype=np.int64)
        result: npt.NDArray[np.int64] = self._constants * counts[self._factors].prod(axis=1)
        return result


def dimensions_of(channel_of: Ids, axes: Axes, shape: Iterable[int]) -> tuple[Dimension, ...]:
    """Return the dimensions of a tensor from the ids along its `axes`, or its sizes without ids.

    `channel_of` gives the prunable channel of each id (`DependencyGraph.channel_of`).
    """
    return tuple(
        int(size) if ids is None else channel_of[ids] for ids, size in zip(axes, shape, strict=True)
    )
