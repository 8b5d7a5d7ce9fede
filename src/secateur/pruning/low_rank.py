"""The best kernel of a rank for given inputs, and what lower ranks cost.

For inputs with second moments G, the error of a kernel W' in place of W is tr S(W' - W) G (W' -
W)ᵀS, with the scale S of what follows. In the `channel` form the best kernel of rank r projects the
outputs onto their r largest principal components. In the `spatial` form there is no closed form:
the vertical kernels are singular vectors of the kernel, whitened by the moments of a column of
inputs, and the horizontal kernels are the regression of the outputs on what the vertical ones give.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.graph.factorisation import form_of

RIDGE = 1e-6
"""Ridge of a regression on the channels in between, as a multiple of their mean variance."""
SMALLEST_SCALE = 1e-3
"""Smallest scale of an output, as a multiple of the largest."""
CURVE_RANKS = 16
"""Ranks that an error is computed for, at most; between them its logarithm is interpolated."""


class LowRank:
    """Kernels of lower rank for one layer.

    `kernel` has the values of a patch in the order of `rows.in_patch_order`, `moments` those of its
    patches, about their mean where the layer can shift its output. All is in float64.
    """

    def __init__(
        self,
        kernel: Float[Tensor, "output value"],
        moments: Float[Tensor, "value value"],
        shape: Sequence[int],
        scale: Float[Tensor, "output"],
    ) -> None:
        self._kernel, self._moments = kernel.double(), moments.double()
        self._shape = tuple(shape)
        """Of the kernel in the network: `(output, input, height, width)`."""
        scale = scale.double().abs().expand(len(kernel))
        self._scale = scale.clamp_min(SMALLEST_SCALE * float(scale.max().clamp_min(1e-30)))

    def nearest(self, rank: int) -> Float[Tensor, "output value"]:
        """Return the best kernel of a rank, as far as its form is known in closed form."""
        if form_of(self._shape) == "channel":
            components = self._components[:, -rank:]
            scaled = components.mT @ (self._scale[:, None] * self._kernel)
            return (components @ scaled) / self._scale[:, None]
        outputs, inputs, height, width = self._shape
        vertical = self._vertical[:, :rank]  # [(height, input), rank]
        products = self._products(width, rank)  # [(width, rank), (width, rank)]
        right = self._targets[:, :, :rank].reshape(outputs, width * rank)
        strength = RIDGE * products.diagonal().mean().clamp_min(1e-30)
        regularised = products + strength * torch.eye(len(products)).to(products)
        horizontal: Tensor = torch.linalg.solve(regularised, right.mT).mT
        kernel = torch.einsum("owr,vr->owv", horizontal.reshape(outputs, width, rank), vertical)
        ordered = kernel.reshape(outputs, width, height, inputs).transpose(1, 2)
        return ordered.reshape(outputs, -1)

    def error(self, rank: int, moments: Float[Tensor, "value value"] | None = None) -> float:
        """Return the squared error of the best kernel of a rank, summed over outputs.

        `moments` are those of the patches that it is measured on, by default of those that the
        kernel is the best for.
        """
        missing = self._scale[:, None] * (self.nearest(rank) - self._kernel)
        moments = self._moments if moments is None else moments.double()
        return max(0.0, float(((missing @ moments) * missing).sum()))

    def curve(self, whole: int, moments: Float[Tensor, "value value"] | None = None) -> list[float]:
        """Return the error when the rank is less than `whole` by 0, 1, … up to `whole`.

        With `whole` the layer is as it was, and the error is 0. For `moments` see `error`.
        """
        steps = min(CURVE_RANKS, whole - 1)
        ranks = sorted({round(1 + (whole - 2) * step / max(1, steps - 1)) for step in range(steps)})
        errors = [self.error(rank, moments) for rank in ranks]
        # On other patches a higher rank may do worse by chance.
        falling = reversed(list(itertools.accumulate(reversed(errors), max)))
        logarithms = [math.log(max(error, 1e-300)) for error in falling]

        def error(rank: int) -> float:
            place = min(max(1, bisect.bisect_left(ranks, rank)), len(ranks) - 1)
            if len(ranks) == 1:
                return math.exp(logarithms[0])
            (left, right), (low, high) = (
                ranks[place - 1 : place + 1],
                logarithms[place - 1 : place + 1],
            )
            return math.exp(low + (high - low) * (rank - left) / (right - left))

        whole_moments = self._moments if moments is None else moments.double()
        nothing = float(((self._kernel @ whole_moments) * self._kernel).sum(1) @ self._scale**2)
        curve = [0.0, *(error(whole - removed) for removed in range(1, whole))]
        return [*curve, max(nothing, curve[-1])]

    @functools.cached_property
    def _components(self) -> Float[Tensor, "output output"]:
        """Principal components of the scaled outputs, the largest last."""
        scaled = self._scale[:, None] * self._kernel
        vectors: Tensor = torch.linalg.eigh(scaled @ self._moments @ scaled.mT)[1]
        return vectors

    @functools.cached_property
    def _vertical(self) -> Float[Tensor, "column rank"]:
        """Vertical kernels, the most important first; values of a column are (height, input)."""
        outputs, inputs, height, width = self._shape
        moments = self._moments.reshape(height, width, inputs, height, width, inputs)
        column = moments.diagonal(dim1=1, dim2=4).mean(-1).reshape(height * inputs, -1)
        values, vectors = torch.linalg.eigh(column)
        roots = values.clamp_min(RIDGE * values[-1].clamp_min(1e-30)).sqrt()
        scaled = self._scale[:, None] * self._kernel
        matrix = scaled.reshape(outputs, height, width, inputs).permute(1, 3, 2, 0)
        whitened = (vectors * roots) @ vectors.mT @ matrix.reshape(height * inputs, -1)
        left: Tensor = torch.linalg.svd(whitened, full_matrices=False)[0]
        vertical: Tensor = (vectors / roots) @ (vectors.mT @ left)
        return vertical

    @functools.cached_property
    def _all_products(self) -> Float[Tensor, "width rank width rank"]:
        """Second moments of what the vertical kernels give, at each place under the kernel."""
        _, inputs, height, width = self._shape
        moments = self._moments.reshape(height, width, inputs, height, width, inputs)
        columns = moments.permute(1, 0, 2, 4, 3, 5).reshape(
            width, height * inputs, width, height * inputs
        )
        half = torch.einsum("ur,wuxv->wrxv", self._vertical, columns)
        return torch.einsum("wrxv,vs->wrxs", half, self._vertical)

    def _products(self, width: int, rank: int) -> Float[Tensor, "value value"]:
        part = self._all_products[:, :rank, :, :rank]
        return part.reshape(width * rank, width * rank)

    @functools.cached_property
    def _targets(self) -> Float[Tensor, "output width rank"]:
        """Products of the outputs with what the vertical kernels give."""
        outputs, inputs, height, width = self._shape
        products = (self._kernel @ self._moments).reshape(outputs, height, width, inputs)
        return products.transpose(1, 2).reshape(outputs, width, -1) @ self._vertical
