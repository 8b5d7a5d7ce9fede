"""Outputs that are no class scores, such as boxes, key points and pictures, compared as values.

Every part of the output is divided by its own standard deviation, so that a squared difference is a
relative one, and parts in different units can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import tree_leaves

Transform = Literal["values", "probabilities", "sigmoid", "softmax"]
LARGEST_READING = 16_384
"""Values that are compared of each image, at most; of more they are a regular sample."""


@dataclass(frozen=True)
class OutputPart:
    """A part of a network's output that is compared by its relative squared error.

    The default is all of the first tensor that the network returns.
    """

    leaf: int = 0
    """Which of the tensors that the network returns, in the order of `floating_leaves`."""
    dim: int = 1
    """Dimension along which the part is cut out, and which `softmax` is over."""
    start: int = 0
    stop: int | None = None
    """The part holds the entries from `start` to before `stop` along `dim`."""
    transform: Transform = "values"
    """What is compared: the values as they are, which may be probabilities, or the probabilities
    that they are the logits of."""
    times: int | None = None
    """Entry along `dim` that the part is multiplied by when it is compared: a detector's
    objectness, so that boxes and classes count where there are objects."""
    deviation: float = 1.0
    """Standard deviation of what is compared, over some images."""

    def read(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image value"]:
        """Return the values of this part, over their deviation, at most `LARGEST_READING`."""
        values = self.select(leaves)
        if self.times is not None:
            values = values * leaves[self.leaf].narrow(self.dim, self.times, 1)
        step = _step(values.shape[1:], LARGEST_READING)
        return values.reshape(len(values), -1).float()[:, ::step] / self.deviation

    def select(self, leaves: Sequence[Tensor]) -> Float[Tensor, "image ..."]:
        """Return the values of this part as they lie in the output, not over their deviation."""
        leaf = leaves[self.leaf]
        if self.start or self.stop is not None:
            stop = leaf.shape[self.dim] if self.stop is None else self.stop
            leaf = leaf.narrow(self.dim, self.start, stop - self.start)
        if self.transform == "sigmoid":
            leaf = leaf.sigmoid()
        elif self.transform == "softmax":
            leaf = leaf.softmax(self.dim)
        return leaf


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
    """Return the parts with the deviations that they have in the leaves of an output.

    Parts that don't vary are left out. Raises `UsageError` if none varies, or one is not there.
    """
    varying = []
    for part in parts:
        is_cut = part.start > 0 or part.stop is not None or part.transform == "softmax"
        is_cut |= part.times is not None
        least = part.dim + 1 if is_cut else 1
        if part.leaf >= len(leaves) or leaves[part.leaf].ndim < least:
            raise UsageError(
                f"outputs name the tensor {part.leaf}, dimension {part.dim}, but the network "
                f"returns {' and '.join(str(list(leaf.shape)) for leaf in leaves)}"
            )
        deviation = float(replace(part, deviation=1.0).read(leaves).double().std(correction=0))
        if 0 < deviation < float("inf"):
            varying.append(replace(part, deviation=deviation))
    if not varying:
        raise UsageError(f"{names} is the same number everywhere, or not finite")
    return tuple(varying)


def _step(shape: Sequence[int], most: int) -> int:
    """Return the step between values of a regular sample of at most `most` of them.

    It shares no factor with a side, so that the sample does not keep to some channels or columns.
    """
    total = torch.Size(shape).numel()
    if total <= most:
        return 1
    return next(
        step for step in count(-(-total // most)) if all(gcd(step, side) == 1 for side in shape)
    )
