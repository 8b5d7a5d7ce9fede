"""Outputs that are no class scores, such as boxes, key points and pictures, compared as values.

What is compared has one unit, so that squared differences of all parts can be added: values are
divided by their standard deviation, and probabilities p become angles, 2 arcsin √p. Half a squared
difference of angles is the divergence of the probabilities in nats, up to higher orders (the Fisher
metric of a Bernoulli variable; Amari and Nagaoka, *Methods of Information Geometry*, 2000, ch. 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import tree_leaves

Transform = Literal["values", "probabilities", "sigmoid", "softmax"]
MOST_VALUES = 16_384
"""Values that are compared of each image, at most; of more they are a regular sample."""
MOST_VALUES_AT_OBJECTS = 2**19
"""The same for parts that count at objects alone, which a sample would miss."""
SMALLEST_PROBABILITY = 1e-12
"""Smaller ones, and ones as near to 1 as float32 goes, count as equal: their angles have no
gradient."""
ABSENT = 1e-10
"""Objectness below which no object is there: what a sigmoid returns is larger."""
ROUNDING = 1e-2
"""How far probabilities may lie outside 0 to 1, as those of half precision do."""


@dataclass(frozen=True)
class OutputPart:
    """A part of a network's output that is compared by its squared error.

    The default is all of the first tensor that the network returns. Indices count from 0. Raises
    `UsageError` for values that no output could have.
    """

    leaf: int = 0
    """Which of the tensors that the network returns, in the order of `floating_leaves`."""
    dim: int = 1
    """Dimension along which the part is cut out, and which `softmax` is over."""
    start: int = 0
    stop: int | None = None
    """The part holds the entries from `start` to before `stop` along `dim`."""
    transform: Transform = "values"
    """What is compared: the values as they are, or probabilities, which the part holds or is the
    logits of."""
    times: int | None = None
    """Entry along `dim` whose value is the weight of the squared error at each position: a
    detector's objectness, so that boxes and classes count where there are objects."""
    weight: float = 1.0
    """Factor of the squared error, beside those of other parts."""
    deviation: float = 1.0
    """What the values are divided by; see `measured`."""

    def __post_init__(self) -> None:
        for name in ("leaf", "start", "stop", "times"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise UsageError(f"OutputPart({name}={number}): indices count from 0")
        if self.dim < 1:
            raise UsageError(
                f"OutputPart(dim={self.dim}) must be 1 or more: dimension 0 is that of the images"
            )
        if self.stop is not None and self.stop <= self.start:
            raise UsageError(f"OutputPart(start={self.start}, stop={self.stop}) holds nothing")
        if self.transform not in get_args(Transform):
            raise UsageError(
                f"OutputPart(transform={self.transform!r}) must be one of "
                f"{', '.join(get_args(Transform))}"
            )
        if not 0 < self.weight < math.inf:
            raise UsageError(f"OutputPart(weight={self.weight}) must be a positive number")

    def read(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image value"]:
        """Return what is compared of this part, in the unit of all parts.

        The mean square of a sample of the values stands for that of all.
        """
        values = self.compared(leaves)
        if self.times is not None:
            values = values * self.objectness(leaves).sqrt()
        step = self._step(values.shape[1:])
        scale = math.sqrt(self.weight * step) / self.deviation
        return values.reshape(len(values), -1)[:, ::step] * scale

    def select(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image ..."]:
        """Return the values or probabilities of this part as they lie in the output."""
        leaf = leaves[self.leaf]
        if self.start or self.stop is not None:
            stop = leaf.shape[self.dim] if self.stop is None else self.stop
            leaf = leaf.narrow(self.dim, self.start, stop - self.start)
        if self.transform == "sigmoid":
            leaf = leaf.sigmoid()
        elif self.transform == "softmax":
            leaf = leaf.softmax(self.dim)
        return leaf

    def compared(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image ..."]:
        """Return the values, or the angles of probabilities, as they lie in the output."""
        values = self.select(leaves).float()
        return values if self.transform == "values" else _angles(values)

    def objectness(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image ..."]:
        """Return the entries that `times` names."""
        assert self.times is not None
        weights = leaves[self.leaf].narrow(self.dim, self.times, 1).float()
        return weights.clamp_min(SMALLEST_PROBABILITY)  # a root has no gradient at 0

    def standard_deviation(self, leaves: Sequence[Tensor]) -> float:
        """Return the standard deviation of values, where they count, or 1 for probabilities."""
        if self.transform != "values":
            return 1.0
        values = self.select(leaves).double()
        if self.times is None:
            return float(values.std(correction=0))
        weights = self.objectness(leaves).double().expand(values.shape)
        total = weights.sum().clamp_min(1e-12)
        mean = (weights * values).sum() / total
        return float((weights * (values - mean).square()).sum().div(total).sqrt())

    def check(self, leaves: Sequence[Tensor]) -> None:
        """Raise `UsageError` if the leaves of an output have no such part."""
        shapes = " and ".join(str(list(leaf.shape)) for leaf in leaves)
        is_cut = self.start > 0 or self.stop is not None or self.transform == "softmax"
        least = self.dim + 1 if is_cut or self.times is not None else 1
        if self.leaf >= len(leaves) or leaves[self.leaf].ndim < least:
            raise UsageError(
                f"outputs name the tensor {self.leaf}, dimension {self.dim}, but the network "
                f"returns {shapes}"
            )
        ends = {"start": self.start + 1, "stop": self.stop, "times": self.times}
        if self.times is not None:
            ends["times"] = self.times + 1
        for name, end in ends.items():
            if end is not None and least > 1 and end > leaves[self.leaf].shape[self.dim]:
                raise UsageError(
                    f"outputs name {name}={getattr(self, name)} in dimension {self.dim} of tensor "
                    f"{self.leaf}, but the network returns {shapes}"
                )
        if self.transform == "probabilities":
            _check_range(self.select(leaves), 1.0, "what outputs call probabilities")
        if self.times is not None:
            weights = leaves[self.leaf].narrow(self.dim, self.times, 1)
            _check_range(weights, math.inf, f"entry times={self.times} of the output, a weight,")

    def _step(self, shape: Sequence[int]) -> int:
        """Return the step between values of a regular sample of those of an image.

        It shares no factor with a side, so that the sample does not keep to some channels or
        columns.
        """
        most = MOST_VALUES if self.times is None else MOST_VALUES_AT_OBJECTS
        total = torch.Size(shape).numel()
        if total <= most:
            return 1
        return next(
            step for step in count(-(-total // most)) if all(gcd(step, side) == 1 for side in shape)
        )


def floating_leaves(output: object, images: int) -> list[Tensor]:
    """Return the floating-point tensors in an output of any structure that have a row an image."""
    return [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.ndim > 0
        and len(leaf) == images
    ]


def measured(
    parts: Sequence[OutputPart], leaves: Sequence[Tensor], *, names: str = "the output"
) -> tuple[OutputPart, ...]:
    """Return the parts with the deviations that make one unit of them, in the leaves of an output.

    With these, what is compared of all parts together has a variance of 1, and weights are as
    given. Parts that don't vary, or whose objectness is 0 everywhere, are left out. Raises
    `UsageError` if none is left, or one is not there or not in the range that it should have.
    """
    varying = []
    for part in parts:
        part.check(leaves)
        if part.times is not None and not bool((part.objectness(leaves) > ABSENT).any()):
            continue
        plain = replace(part, deviation=1.0)
        spread = float(plain.read(leaves).double().std(correction=0))
        if 0 < spread < float("inf") and (deviation := plain.standard_deviation(leaves)) > 0:
            varying.append(replace(part, deviation=deviation))
    if not varying:
        raise UsageError(f"{names} is the same number everywhere, or not finite")
    readings = [part.read(leaves).double() for part in varying]
    squares = sum(float(reading.var(correction=0)) * reading.numel() for reading in readings)
    scale = math.sqrt(squares / sum(reading.numel() for reading in readings))
    return tuple(replace(part, deviation=part.deviation * scale) for part in varying)


def _check_range(values: Tensor, most: float, what: str) -> None:
    """Raise `UsageError` if values are logits where 0 to `most` is meant, beyond rounding."""
    least, largest = float(values.min()), float(values.max())
    if least < -ROUNDING or largest > most + ROUNDING:
        raise UsageError(
            f"{what} goes from {least:.4g} to {largest:.4g}: if these are logits, apply the "
            "sigmoid in the network or in forward="
        )


def _angles(probabilities: Tensor) -> Tensor:
    """Return 2 arcsin √p."""
    largest = 1 - torch.finfo(probabilities.dtype).eps / 2
    return 2 * probabilities.clamp(SMALLEST_PROBABILITY, largest).sqrt().asin()
