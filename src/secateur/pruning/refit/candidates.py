"""What the ways to estimate a kernel have in common.

A form sees every batch as often as it has `passes`, and then has chosen the kernel that errs least
on the images that were held out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.graph.patches import PositionSampling
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths to choose from, as multiples of the inputs' mean variance."""


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """What a layer meets, at one of its places, in some images."""

    inputs: Float[Tensor, "row ..."]
    """What it reads in the cut network."""
    originals: Float[Tensor, "row ..."] | None
    """What it reads in the original one; None where nobody needs it again."""
    target: RegressionTargets
    """What it should answer."""
    spread: PositionSampling
    """Which positions are looked at."""
    held_out: Bool[Tensor, "row"]


@dataclass(frozen=True, eq=False)
class Choice:
    """A kernel and how it did on images held out of the fit, or on all where there are none."""

    error_cut: float
    """Squared error over the variance of what should come out, with the kernel as cut."""
    error: float
    """The same with the chosen kernel."""
    ridge: float | None
    """The chosen ridge; None where no kernel did better than that as cut."""


Pass = tuple[Callable[[int, LayerBatch], None], Callable[[], None]]
"""What to do with what the layer meets at each of its places, and what to do in the end."""


class Regression(Protocol):
    """A way to estimate a kernel."""

    @property
    def passes(self) -> Sequence[Pass]:
        """One after the other each sees every batch."""

    def choice(self) -> Choice:
        """Writes the best kernel and offset; what they achieve."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kernel, in any shape, to be compared with others; rounded as it would be written."""

    ridge: float | None
    """None of the kernel as cut."""
    kernel: Tensor
    offset: Tensor


def best_of(candidates: Sequence[Candidate], errors: Sequence[float]) -> tuple[Candidate, Choice]:
    """The one of least error, if that is less than the error of the first one, as cut."""
    found = [(error, number) for number, error in enumerate(errors) if math.isfinite(error)]
    error, number = min(found, default=(errors[0], 0))
    best = candidates[number]
    return best, Choice(errors[0], error, best.ridge)


def write(state: State, weight: str, candidate: Candidate, place: OffsetPlace | None) -> None:
    """Puts a kernel and an offset where the network holds them."""
    if candidate.ridge is None:
        return
    # In the memory format of the old one, which what is computed with it has too.
    state[weight] = torch.empty_like(state[weight]).copy_(candidate.kernel)
    if place is not None:
        place.write(state, candidate.offset)
