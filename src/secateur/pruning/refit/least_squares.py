"""Ridge regression from sums of products: rows are streamed, only Gram matrices are kept.

Several problems of one size are solved at once, one for each group of a convolution.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_VARIANCE = 1e-12
"""Lower bound of the inputs' variance when the ridge is scaled by it."""


class Gram:
    """Sums of products of inputs and targets, from which every least-squares error follows.

    Sums are in float64, so that the order of the rows matters only up to rounding.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count: Tensor = zeros()
        self.xx: Tensor = zeros(groups, inputs, inputs)
        self.xy: Tensor = zeros(groups, inputs, outputs)
        self.x: Tensor = zeros(groups, inputs)
        self.y: Tensor = zeros(groups, outputs)
        self.yy: Tensor = zeros(groups, outputs)

    def add(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add rows of inputs and targets."""
        x = x.double()
        self.count += x.shape[1]
        self.xx.baddbmm_(x.mT, x)
        self.x += x.sum(1)
        self.add_targets(x, y)

    def add_targets(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add targets for inputs that are counted already."""
        x, y = x.double(), y.double()
        self.xy.baddbmm_(x.mT, y)
        self.y += y.sum(1)
        self.yy += y.square().sum(1)

    def without_targets(self) -> Gram:
        """Return a copy that shares the sums of the inputs and has no targets yet."""
        result = copy.copy(self)
        result.xy, result.y, result.yy = map(torch.zeros_like, (self.xy, self.y, self.yy))
        return result

    def target_state(self) -> tuple[Tensor, ...]:
        """Return the sums that involve targets."""
        return self.xy, self.y, self.yy

    def state(self) -> tuple[Tensor, ...]:
        """Return all sums, to be added up over processes."""
        return self.count, self.xx, self.x, *self.target_state()

    def variance(self) -> Float[Tensor, ""]:
        """Return the variance of the targets, summed over outputs; never quite zero."""
        variances = self.yy / self.count - (self.y / self.count).square()
        return variances.sum().clamp_min(1e-30)

    def squared_error(
        self, kernel: Float[Tensor, "group output input"], bias: Float[Tensor, "group output"]
    ) -> Float[Tensor, ""]:
        """Return the mean over rows of (y - kernel x - bias)^2, summed over outputs."""
        n = self.count
        quadratic = ((kernel @ self.xx) * kernel).sum(2) / n
        mixed = (self.xy.mT * kernel).sum(2) / n
        x_mean, y_mean = (kernel @ self.x[..., None]).squeeze(-1) / n, self.y / n
        errors = self.yy / n - 2 * mixed + quadratic + bias * (bias - 2 * y_mean + 2 * x_mean)
        return errors.clamp_min(0).sum()

    def ridge(
        self,
        kernel: Float[Tensor, "group output input"],
        ridge: float,
        bias: Float[Tensor, "group output"] | None,
    ) -> tuple[Float[Tensor, "group output input"], Float[Tensor, "group output"]]:
        """Return the kernel and bias that fit best, with a penalty on the distance to `kernel`.

        `ridge` is a multiple of the mean variance of a group's inputs. A `bias` is kept; without
        one it is fitted as well. If a system can't be solved, the kernel holds values that are not
        finite.
        """
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count
        if bias is None:
            xx -= x[:, :, None] * x[:, None]
        xy = self.xy / self.count - x[:, :, None] * (y if bias is None else bias)[:, None]
        strength = ridge * xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST_VARIANCE)
        xx.diagonal(dim1=1, dim2=2).add_(strength[:, None])
        xy += strength[:, None, None] * kernel.mT
        # A matrix that is positive only up to rounding has no Cholesky factor: use LU instead.
        factor, failed = torch.linalg.cholesky_ex(xx)
        if bool(failed.any()):
            new, _ = torch.linalg.solve_ex(xx, xy)
        else:
            new = torch.cholesky_solve(xy, factor)
        if bias is None:
            bias = y - (new.mT @ x[..., None]).squeeze(-1)
        return new.mT, bias
