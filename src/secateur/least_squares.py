"""Least squares from sums of products: rows stream through, only their Gram matrices are kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_A_TIME = 4096
"""Rows whose products are added up in their own precision, before they go into float64 sums."""


class Gram:
    """Sums of products of inputs and targets, from which every least-squares error follows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.y = torch.zeros(outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)

    def add(self, x: Float[Tensor, "row input"], y: Float[Tensor, "row output"]) -> None:
        """Takes in rows; products are formed in the rows' own precision, sums in float64."""
        self.count += len(x)
        for some, wanted in zip(x.split(ROWS_AT_A_TIME), y.split(ROWS_AT_A_TIME), strict=True):
            self.xx += some.T @ some
            self.xy += some.T @ wanted
            self.x += some.sum(0, dtype=torch.float64)
            self.y += wanted.sum(0, dtype=torch.float64)
            self.yy += wanted.double().square().sum(0)

    def merge(self, other: Gram) -> None:
        """Takes in all that another one has seen."""
        self.count += other.count
        for own, more in (
            (self.xx, other.xx),
            (self.xy, other.xy),
            (self.x, other.x),
            (self.y, other.y),
            (self.yy, other.yy),
        ):
            own += more

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariances of the inputs, and of inputs and outputs."""
        x, y = self.x / self.count, self.y / self.count
        return self.xx / self.count - x.outer(x), self.xy / self.count - x.outer(y)

    def squared_error(self, kernel: Tensor, bias: Tensor) -> Tensor:
        """Mean of (y - kernel x - bias)^2, by output."""
        n = self.count
        quadratic = ((self.xx @ kernel.T) * kernel.T).sum(0) / n
        mixed = (self.xy * kernel.T).sum(0) / n
        x_mean, y_mean = kernel @ self.x / n, self.y / n
        return (
            self.yy / n - 2 * mixed + quadratic + bias * (bias - 2 * y_mean + 2 * x_mean)
        ).clamp_min(0)

    def ridge(
        self, kernel: Tensor, ridge: float, bias: Tensor | None
    ) -> tuple[Float[Tensor, "output input"], Float[Tensor, "output"]]:
        """The kernel and bias that fit best, drawn towards `kernel` `[output, input]`.

        `ridge` is a multiple of the inputs' mean variance. The bias is fitted as well, unless one
        is given that must stay.
        """
        if bias is None:
            xx, xy = self.centred()
        else:
            xx = self.xx / self.count
            xy = (self.xy - self.x.outer(bias)) / self.count
        strength = ridge * xx.diagonal().mean().clamp_min(1e-12)
        system = xx + strength * torch.eye(len(xx), dtype=torch.float64)
        right = xy + strength * kernel.T
        # A matrix that is positive only up to rounding has no Cholesky factor: LU serves there.
        factor, failed = torch.linalg.cholesky_ex(system)
        new = torch.linalg.solve(system, right) if failed else torch.cholesky_solve(right, factor)
        if bias is None:
            bias = self.y / self.count - new.T @ (self.x / self.count)
        return new.T, bias
