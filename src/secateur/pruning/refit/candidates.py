"""What the forms of regression share: their input, their candidates, and the choice of the best.

A regression sees every batch once in each of its `passes`. Then it has chosen the kernel with the
smallest error on the images that are held out of the fit.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.graph.patches import PositionSampling
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)
"""Ridge strengths to choose from, as multiples of the inputs' mean variance. Where images are few
for many inputs, the best one is large; with the largest the offset alone is estimated."""


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """Inputs and targets of a layer, at one place where it is used, for some images."""

    inputs: Float[Tensor, "row ..."]
    """The layer's input in the cut network."""
    originals: Float[Tensor, "row ..."] | None
    """Its input in the original network, in the first pass, if the regression reads it."""
    targets: RegressionTargets
    sampling: PositionSampling
    """The output positions that are used."""
    held_out: Bool[Tensor, "row"]


@dataclass(frozen=True, eq=False)
class Choice:
    """Errors of the chosen kernel, on images held out of the fit, or on all if there are none."""

    error_cut: float
    """Squared error over the variance of the targets, with the kernel as cut."""
    error: float
    """The same with the chosen kernel."""
    ridge: float | None
    """The chosen ridge; None if no kernel did better than the one as cut."""


Pass = tuple[Callable[[int, LayerBatch], None], Callable[[], None]]
"""`take_in(number, batch)`, called for each batch at each place where the layer is used, and
`conclude()`, called once after that."""


class Regression(abc.ABC):
    """A form of regression that estimates a kernel from all uses of its layer."""

    reads_originals: ClassVar[bool] = False
    """Whether it needs `LayerBatch.originals`."""

    @property
    @abc.abstractmethod
    def passes(self) -> Sequence[Pass]:
        """Passes over all batches, in order."""

    @abc.abstractmethod
    def choice(self) -> Choice:
        """Write the best kernel and offset, and return their errors."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kernel to compare with others, in any shape, rounded as it would be written."""

    ridge: float | None
    """None for the kernel as cut."""
    kernel: Tensor
    offset: Tensor


def best_of(candidates: Sequence[Candidate], errors: Sequence[float]) -> tuple[Candidate, Choice]:
    """Return the candidate with the smallest error; the first one is the kernel as cut."""
    finite = [(error, number) for number, error in enumerate(errors) if math.isfinite(error)]
    error, number = min(finite, default=(errors[0], 0))
    best = candidates[number]
    return best, Choice(errors[0], error, best.ridge)


def descend(count: int, error_of: Callable[[int], float]) -> None:
    """Call `error_of` for numbers below `count`, as long as the error falls.

    It starts before the middle, where the best ridge mostly is, and first goes up; it goes down if
    nothing was gained there. A number is tried once.
    """
    errors: dict[int, float] = {}

    def error(number: int) -> float:
        if number not in errors:
            value = error_of(number)
            errors[number] = value if math.isfinite(value) else math.inf
        return errors[number]

    start = number = 4 * count // 9
    for step in (1, -1):
        while 0 <= number + step < count and error(number + step) < error(number):
            number += step
        if number != start:
            return
    error(start)


def write(state: State, weight: str, candidate: Candidate, place: OffsetPlace | None) -> None:
    """Write a kernel and an offset to the places where the network holds them."""
    if candidate.ridge is None:
        return
    # In the memory format of the old kernel, so that activations keep theirs.
    state[weight] = torch.empty_like(state[weight]).copy_(candidate.kernel)
    if place is not None:
        place.write(state, candidate.offset)
