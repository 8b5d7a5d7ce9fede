"""Kernels from a regression of what a layer should answer on what its kernel meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secateur import distributed
from secateur.consumers import Consumer, by_group
from secateur.estimates import RIDGES, Candidate, Choice, Look, Pass, best_of, write
from secateur.least_squares import Gram
from secateur.patches import from_patch_order, in_patch_order
from secateur.targets import OffsetPlace, State

MAX_ROW_VALUES = 2**22
"""Values of patches held at a time (32 MiB in float64)."""


class PatchForm:
    """See `estimates.Form`."""

    def __init__(
        self, consumers: Sequence[Consumer], state: State, place: OffsetPlace | None
    ) -> None:
        self._consumers = consumers
        self._state = state
        self._place = place
        self._weight = consumers[0].layer.weight
        kernel, groups = state[self._weight], consumers[0].groups
        self._old = in_patch_order(kernel.double(), groups)
        _, outputs, inputs = self._old.shape
        self._fit = Gram(groups, inputs, outputs, kernel.device)
        self._held_out = Gram(groups, inputs, outputs, kernel.device)
        self._choice: Choice | None = None

    @property
    def passes(self) -> Sequence[Pass]:
        """See `estimates.Form`."""
        return [(self._add, self._solve)]

    def choice(self) -> Choice:
        """See `estimates.Form`."""
        assert self._choice is not None
        return self._choice

    def _add(self, number: int, look: Look) -> None:
        consumer = self._consumers[number]
        chosen = look.spread.over(consumer.positions)
        values = self._old.shape[0] * self._old.shape[2] * chosen.shape[1]
        for gram, images in ((self._fit, ~look.held_out), (self._held_out, look.held_out)):
            for some in images.nonzero()[:, 0].split(max(1, MAX_ROW_VALUES // values)):
                if len(some):
                    rows = consumer.patches(look.inputs[some], chosen[some.cpu()])
                    gram.add(rows, by_group(look.wanted[some], consumer.groups))

    def _solve(self) -> None:
        distributed.add_up([*self._fit.tallies(), *self._held_out.tallies()])
        check = self._held_out if self._held_out.count else self._fit
        candidates, errors = [], []
        for kernel, offset, ridge in self._solutions():
            error = check.squared_error(kernel, offset) / check.variance()
            shape = self._state[self._weight].shape
            candidates.append(Candidate(ridge, from_patch_order(kernel, shape), offset.flatten()))
            errors.append(float(error))
        best, self._choice = best_of(candidates, errors)
        write(self._state, self._weight, best, self._place)

    def _solutions(self) -> Iterator[tuple[Tensor, Tensor, float | None]]:
        """Kernels and offsets, rounded to what the network can hold: first those as cut."""
        nothing = torch.zeros_like(self._fit.y)
        yield self._old, nothing, None
        for ridge in RIDGES:
            kernel, offset = self._fit.ridge(self._old, ridge, None if self._place else nothing)
            if self._place is not None:
                offset = self._place.rounded(self._state, offset)
            yield kernel.to(self._state[self._weight].dtype).double(), offset, ridge


def patch_bytes(consumer: Consumer, kernel: Tensor) -> int:
    """What the sums of the patch form take in memory, with all that is made of them at a time."""
    groups, outputs, inputs = in_patch_order(kernel, consumer.groups).shape
    return 8 * groups * inputs * (5 * inputs + 6 * outputs)
