"""How large values are in a cut network: products of numbers of channels, for many values at once.

An allocation asks for a size thousands of times. So what can be known before the cut is worked out
once, dimensions that several values have in common are counted once, and all in one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from secateur.graph.channel_ids import Axes, Ids
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed

Dimension = Ids | int
"""Prunable channel of each index, -1 where the index must stay; or a size that never changes."""


class TensorSizes:
    """Numbers of elements, `[value]`, in any network that is cut from a dependency graph."""

    def __init__(
        self, dependencies: DependencyGraph, values: Iterable[Sequence[Dimension]]
    ) -> None:
        """Of each value its dimensions."""
        sizes = [len(group) for group in dependencies.groups.values()]
        starts = itertools.accumulate(sizes, initial=0)
        self._start = dict(zip(dependencies.groups, starts, strict=False))
        self._stays = np.ones(sum(sizes) + 1, dtype=bool)  # the last is what can't be cut
        place = np.full(
            len(dependencies.channel_of) + 1, sum(sizes)
        )  # [channel, or -1 for the last]
        for name, group in dependencies.groups.items():
            place[group.channels] = self._start[name] + np.arange(len(group))
        number: dict[bytes, int] = {}
        counted: list[Ids] = []
        factors: list[list[int]] = []
        constants: list[int] = []
        for dimensions in values:
            factors.append([])
            constants.append(1)
            for dimension in dimensions:
                if isinstance(dimension, int):
                    constants[-1] *= dimension
                elif (dimension == NOT_PRUNABLE).all():
                    constants[-1] *= len(dimension)
                else:
                    key = dimension.tobytes()
                    if key not in number:
                        number[key] = len(counted)
                        counted.append(place[dimension])
                    factors[-1].append(number[key])
        self._constants = np.array(constants, dtype=np.int64)
        self._places = np.concatenate([*counted, np.zeros(0, dtype=np.int64)])
        self._bounds = np.array([0, *itertools.accumulate(map(len, counted))], dtype=np.int64)
        widest = max(map(len, factors), default=0)
        # A factor that a value does not have is the last one, which is 1.
        padded = [[*each, *[len(counted)] * (widest - len(each))] for each in factors]
        self._factors = np.array(padded, dtype=np.int64).reshape(len(factors), widest)

    def __call__(self, removed: Removed) -> npt.NDArray[np.int64]:
        """The numbers when `removed` channels of each group go."""
        gone = [len(numbers) for numbers in removed.values()]
        numbers = np.fromiter(itertools.chain.from_iterable(removed.values()), np.int64, sum(gone))
        numbers += np.repeat(np.array([self._start[n] for n in removed], dtype=np.int64), gone)
        stays = self._stays.copy()
        stays[numbers] = False
        counts = np.ones(len(self._bounds), dtype=np.int64)
        if len(self._places):
            counts[:-1] = np.add.reduceat(stays[self._places], self._bounds[:-1], dtype=np.int64)
        result: npt.NDArray[np.int64] = self._constants * counts[self._factors].prod(axis=1)
        return result


def dimensions_of(
    dependencies: DependencyGraph, axes: Axes, shape: Iterable[int]
) -> tuple[Dimension, ...]:
    """The dimensions of a value with these ids along them, and these sizes where there are none."""
    return tuple(
        int(size) if ids is None else dependencies.channel_of[ids]
        for ids, size in zip(axes, shape, strict=True)
    )
