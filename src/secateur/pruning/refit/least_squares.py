"""Ridge regression from rows that are streamed.

`Gram` keeps sums of products only. `Rows` keeps the rows themselves, and serves where there are
fewer of them than inputs. Several problems of one size are solved at once, one for each group of a
convolution.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.runtime import distributed

SMALLEST_VARIANCE = 1e-12
"""Lower bound of the inputs' variance when the ridge is scaled by it."""


class LeastSquares(abc.ABC):
    """Inputs and targets, for which the best kernel near another one is found.

    Rows are added, then merged over the processes, then solved. All is solved in float64.
    """

    @abc.abstractmethod
    def add(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add rows of inputs and targets, in float32."""

    @abc.abstractmethod
    def add_targets(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add targets for inputs that are there already, in the same order."""

    @abc.abstractmethod
    def without_targets(self) -> LeastSquares:
        """Return a copy that shares the merged inputs and has no targets yet."""

    @abc.abstractmethod
    def merge(self) -> None:
        """Add the inputs and targets of all processes."""

    @abc.abstractmethod
    def merge_targets(self) -> None:
        """Add the targets of all processes for inputs that are merged already."""

    @abc.abstractmethod
    def ridge(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group output input"], Float[Tensor, "group output"]]:
        """Return the kernel and bias that fit best, with a penalty on the distance to the old one.

        `ridge` is a multiple of the mean variance of a group's inputs. If a system can't be solved,
        the kernel holds values that are not finite.
        """


class Gram(LeastSquares):
    """Sums of products of inputs and targets.

    Products of a block of rows are computed in float32, about the block's mean, and added in
    float64. So the order of the rows matters only up to rounding, and inputs far from zero lose
    nothing.
    """

    def __init__(
        self,
        old: Float[Tensor, "group output input"],
        bias: Float[Tensor, "group output"] | None,
    ) -> None:
        """Estimate a kernel near `old`; a `bias` is kept, without one it is fitted as well."""
        groups, outputs, inputs = old.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=old.device)

        self._old, self._bias = old.double(), bias
        self._count, self._x, self._y = zeros(), zeros(groups, inputs), zeros(groups, outputs)
        self._xx, self._xy = zeros(groups, inputs, inputs), zeros(groups, inputs, outputs)
        """Sums of products; once they are merged, means of products, about the mean if there is no
        `bias` to keep."""

    def add(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add rows; see `LeastSquares.add`."""
        self._count += x.shape[1]
        if x.shape[1]:
            self._x += _add_products(self._xx, x, x)
        self.add_targets(x, y)

    def add_targets(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add targets; see `LeastSquares.add_targets`."""
        if x.shape[1]:
            self._y += _add_products(self._xy, x, y)

    def without_targets(self) -> Gram:
        """Return a copy without targets; see `LeastSquares.without_targets`."""
        result = copy.copy(self)
        result._xy, result._y = torch.zeros_like(self._xy), torch.zeros_like(self._y)
        return result

    def merge(self) -> None:
        """Add the sums of all processes, and divide them by the number of rows."""
        distributed.all_reduce_sum([self._count, self._xx, self._x])
        self._x /= self._count
        self._xx /= self._count
        if self._bias is None:
            self._xx.baddbmm_(self._x[:, :, None], self._x[:, None], alpha=-1)
        self.merge_targets()

    def merge_targets(self) -> None:
        """Add the sums with targets of all processes; see `merge`."""
        distributed.all_reduce_sum([self._xy, self._y])
        self._y /= self._count
        self._xy /= self._count
        offset = self._y if self._bias is None else self._bias
        self._xy.baddbmm_(self._x[:, :, None], offset[:, None], alpha=-1)

    def ridge(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group output input"], Float[Tensor, "group output"]]:
        """Return the best kernel and bias; see `LeastSquares.ridge`."""
        variance = self._xx.diagonal(dim1=1, dim2=2).mean(1)
        strength = ridge * variance.clamp_min(SMALLEST_VARIANCE)
        right = torch.addcmul(self._xy, strength[:, None, None], self._old.mT)
        new = _solve(self._xx, strength, right)
        if self._bias is not None:
            return new.mT, self._bias
        return new.mT, self._y - (new.mT @ self._x[..., None]).squeeze(-1)


class Rows(LeastSquares):
    """Rows, fewer than inputs: the system has as many unknowns as there are rows.

    With residuals R of the old kernel, (XᵀX/n + s)⁻¹ XᵀR/n = Xᵀ (XXᵀ + ns)⁻¹ R (Saunders et al.,
    *Ridge Regression Learning Algorithm in Dual Variables*, ICML 1998).
    """

    def __init__(
        self,
        old: Float[Tensor, "group output input"],
        bias: Float[Tensor, "group output"] | None,
    ) -> None:
        """Estimate a kernel near `old`; a `bias` is kept, without one it is fitted as well."""
        groups, outputs, inputs = old.shape
        self._old, self._bias = old.double(), bias
        self._added_x = [torch.zeros(groups, 0, inputs, device=old.device)]
        self._added_y = [torch.zeros(groups, 0, outputs, device=old.device)]
        nothing = torch.zeros(groups, 0, 0, dtype=torch.float64, device=old.device)
        self._x = self._x_mean = self._y_mean = nothing
        """Merged inputs, about the mean if there is no `bias` to keep, and the means."""
        self._products = self._outputs = self._residuals = nothing
        """Products of all pairs of rows; what the old kernel answers, and how far off it is."""

    def add(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add rows; see `LeastSquares.add`."""
        self._added_x.append(x)
        self.add_targets(x, y)

    def add_targets(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add targets; see `LeastSquares.add_targets`."""
        del x
        self._added_y.append(y)

    def without_targets(self) -> Rows:
        """Return a copy without targets; see `LeastSquares.without_targets`."""
        result = copy.copy(self)
        result._added_y = [self._added_y[0][:, :0]]
        return result

    def merge(self) -> None:
        """Gather the rows of all processes, and multiply them with each other."""
        x = _of_all_processes(self._added_x)
        self._added_x = []
        self._x_mean = x.mean(1, keepdim=True)
        self._x = x - self._x_mean if self._bias is None else x
        self._products = self._x @ self._x.mT
        self._outputs = self._x @ self._old.mT
        self.merge_targets()

    def merge_targets(self) -> None:
        """Gather the targets of all processes."""
        y = _of_all_processes(self._added_y)
        self._y_mean = y.mean(1)
        offset = self._y_mean if self._bias is None else self._bias
        self._residuals = y - offset[:, None] - self._outputs

    def ridge(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group output input"], Float[Tensor, "group output"]]:
        """Return the best kernel and bias; see `LeastSquares.ridge`."""
        inputs = self._x.shape[2]
        square = self._products.diagonal(dim1=1, dim2=2).sum(1) / inputs
        count = self._x.shape[1]
        strength = ridge * (square / count).clamp_min(SMALLEST_VARIANCE)
        weights = _solve(self._products, count * strength, self._residuals)
        new = self._old + weights.mT @ self._x
        if self._bias is not None:
            return new, self._bias
        return new, self._y_mean - (new @ self._x_mean.mT).squeeze(-1)


def _add_products(
    sums: Float[Tensor, "group left right"],
    left: Float[Tensor, "group row left"],
    right: Float[Tensor, "group row right"],
) -> Float[Tensor, "group right"]:
    """Add the products of two blocks of rows to float64 sums; return the sums of the right one."""
    count = left.shape[1]
    left_mean, right_mean = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
    left, right = left - left_mean, right - right_mean
    sums += left.mT @ right
    # What the means add: exact, since they are subtracted as the float32 numbers that they are.
    left_mean, right_mean = left_mean.double(), right_mean.double()
    left_sum = left.sum(1, keepdim=True, dtype=torch.float64) + count * left_mean
    right_sum = right.sum(1, keepdim=True, dtype=torch.float64)
    sums.baddbmm_(torch.cat([left_mean, left_sum], 1).mT, torch.cat([right_sum, right_mean], 1))
    return (right_sum + count * right_mean)[:, 0]


def _solve(
    matrix: Float[Tensor, "group unknown unknown"],
    strength: Float[Tensor, "group"],
    right: Float[Tensor, "group unknown output"],
) -> Float[Tensor, "group unknown output"]:
    """Return the solution of symmetric systems with a number added to their diagonals.

    A matrix that is positive only up to rounding has no Cholesky factor: then it is LU's.
    """
    matrix = matrix.clone()
    matrix.diagonal(dim1=1, dim2=2).add_(strength[:, None])
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    solution: Tensor = torch.linalg.solve_ex(matrix, right)[0]
    return solution


def _of_all_processes(parts: Sequence[Tensor]) -> Tensor:
    """Return rows `[group, row, value]` of all processes as one tensor, in float64."""
    rows = torch.cat(list(parts), 1)
    gathered = distributed.all_gather(rows.cpu())
    return torch.cat([part.to(rows.device) for part in gathered], 1).double()
