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
FLOAT32_ROWS = 4096
"""Products of about so many rows are summed in float32, before they are added in float64."""
STRIPS = 8
"""Strips of rows that a symmetric product is computed in, each without what mirrors another…"""
NARROWEST_STRIP = 32
"""…and the fewest rows of one."""


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

    @abc.abstractmethod
    def moments(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group input input"], Float[Tensor, "group input"]]:
        """Return the inputs' products that `ridge` solves with, and their mean, or 0 for a bias.

        A change of the kernel shifts the outputs by its product with that mean.
        """


class Gram(LeastSquares):
    """Sums of products of inputs and targets.

    Products of some thousand rows are summed in float32, about the mean of the first ones, and
    these sums are added in float64. So the order of the rows matters only up to rounding, and
    inputs far from zero lose nothing.
    """

    def __init__(
        self,
        old: Float[Tensor, "group output input"],
        bias: Float[Tensor, "group output"] | None,
    ) -> None:
        """Estimate a kernel near `old`; a `bias` is kept, without one it is fitted as well."""
        self._old, self._bias = old.double(), bias
        self._products = self._new_products(of_targets=False)
        self._target_products = self._new_products(of_targets=True)
        nothing = torch.zeros((), dtype=torch.float64, device=old.device)
        self._x = self._y = self._xx = self._yx = nothing
        """Means, and means of products, about the means if there is no `bias` to keep; known once
        the sums are merged."""

    def _new_products(self, *, of_targets: bool) -> Products:
        groups, outputs, inputs = self._old.shape
        left = outputs if of_targets else inputs
        return Products(groups, left, inputs, self._old.device, is_square=not of_targets)

    def add(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add rows; see `LeastSquares.add`."""
        self._products.add(x, x)
        self.add_targets(x, y)

    def add_targets(
        self, x: Float[Tensor, "group row input"], y: Float[Tensor, "group row output"]
    ) -> None:
        """Add targets; see `LeastSquares.add_targets`."""
        self._target_products.add(y, x)

    def without_targets(self) -> Gram:
        """Return a copy without targets; see `LeastSquares.without_targets`."""
        result = copy.copy(self)
        result._target_products = self._new_products(of_targets=True)
        return result

    def merge(self) -> None:
        """Add the sums of all processes, and divide them by the number of rows."""
        _, self._x, self._xx = self._products.means()
        if self._bias is None:
            self._xx.baddbmm_(self._x[:, :, None], self._x[:, None], alpha=-1)
        self.merge_targets()

    def merge_targets(self) -> None:
        """Add the sums with targets of all processes; see `merge`."""
        self._y, _, self._yx = self._target_products.means()
        offset = self._y if self._bias is None else self._bias
        self._yx.baddbmm_(offset[:, :, None], self._x[:, None], alpha=-1)

    def ridge(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group output input"], Float[Tensor, "group output"]]:
        """Return the best kernel and bias; see `LeastSquares.ridge`."""
        strength = self._strength(ridge)
        right = torch.addcmul(self._yx, strength[:, None, None], self._old)
        new = _solve(self._xx, strength, right.mT)
        if self._bias is not None:
            return new.mT, self._bias
        return new.mT, self._y - (new.mT @ self._x[..., None]).squeeze(-1)

    def moments(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group input input"], Float[Tensor, "group input"]]:
        """Return products and mean of the inputs; see `LeastSquares.moments`."""
        products = self._xx.clone()
        products.diagonal(dim1=1, dim2=2).add_(self._strength(ridge)[:, None])
        return products, self._x if self._bias is None else torch.zeros_like(self._x)

    def _strength(self, ridge: float) -> Float[Tensor, "group"]:
        variance = self._xx.diagonal(dim1=1, dim2=2).mean(1)
        return ridge * variance.clamp_min(SMALLEST_VARIANCE)


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
        strength = self._strength(ridge)
        weights = _solve(self._products, self._x.shape[1] * strength, self._residuals)
        new = self._old + weights.mT @ self._x
        if self._bias is not None:
            return new, self._bias
        return new, self._y_mean - (new @ self._x_mean.mT).squeeze(-1)

    def moments(
        self, ridge: float
    ) -> tuple[Float[Tensor, "group input input"], Float[Tensor, "group input"]]:
        """Return products and mean of the inputs; see `LeastSquares.moments`."""
        products = self._x.mT @ self._x / self._x.shape[1]
        products.diagonal(dim1=1, dim2=2).add_(self._strength(ridge)[:, None])
        mean = self._x_mean.squeeze(1)
        return products, mean if self._bias is None else torch.zeros_like(mean)

    def _strength(self, ridge: float) -> Float[Tensor, "group"]:
        square = self._products.diagonal(dim1=1, dim2=2).sum(1) / self._x.shape[2]
        return ridge * (square / self._x.shape[1]).clamp_min(SMALLEST_VARIANCE)


class Products:
    """Sums of products of two kinds of rows, or of one kind with itself."""

    def __init__(
        self, groups: int, left: int, right: int, device: torch.device, *, is_square: bool
    ) -> None:
        self._is_square = is_square
        self.device: torch.device = device
        self._centres: tuple[Tensor, Tensor] | None = None
        """What rows are taken relative to, `[group, 1, value]` of both kinds: the means of the
        first ones, in float32."""
        self._rows, self._recent_rows = 0, 0
        self._recent = torch.zeros(groups, left, right, device=device)
        """Products of the rows since they were last added to the sums."""
        self._sums = torch.zeros(groups, left, right, dtype=torch.float64, device=device)
        self._left, self._right = self._sums.new_zeros(groups, left), self._sums[:, 0].clone()

    def add(
        self, left: Float[Tensor, "group row left"], right: Float[Tensor, "group row right"]
    ) -> None:
        """Add the products of some rows, in float32."""
        if not left.shape[1]:
            return
        if self._centres is None:
            self._centres = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
        right = right - self._centres[1]
        left = right if self._is_square else left - self._centres[0]
        width = left.shape[2]
        # A square is symmetric: only its blocks on and above the diagonal are computed.
        step = max(NARROWEST_STRIP, -(-width // STRIPS)) if self._is_square else width
        for start in range(0, width, step):
            rows = left[:, :, start : start + step].mT
            columns = slice(start if self._is_square else 0, None)
            block = self._recent[:, start : start + step, columns]
            block.baddbmm_(rows, right[:, :, columns])
        sums = _row_sums(right)
        self._right += sums
        self._left += sums if self._is_square else _row_sums(left)
        self._rows += left.shape[1]
        self._recent_rows += left.shape[1]
        if self._recent_rows >= FLOAT32_ROWS:
            self._collect()

    def means(self) -> tuple[Tensor, Tensor, Float[Tensor, "group left right"]]:
        """Return the mean of both kinds of rows of all processes, and that of their products.

        It is called once, at the end.
        """
        self._collect()
        if self._is_square:
            self._sums.triu_().add_(self._sums.triu(1).mT)
        if self._centres is not None:
            left, right = (centre.double() for centre in self._centres)
            # Exact, since the centres are subtracted as the float32 numbers that they are.
            self._sums.baddbmm_(left.mT, self._right[:, None] + self._rows * right)
            self._sums.baddbmm_(self._left[:, :, None], right)
            self._left += self._rows * left[:, 0]
            self._right += self._rows * right[:, 0]
        count = self._sums.new_tensor(self._rows)
        distributed.all_reduce_sum([count, self._sums, self._left, self._right])
        return self._left / count, self._right / count, self._sums.div_(count)

    def _collect(self) -> None:
        """Add the recent products to the sums."""
        self._sums += self._recent
        self._recent.zero_()
        self._recent_rows = 0


def _row_sums(rows: Float[Tensor, "group row value"]) -> Float[Tensor, "group value"]:
    """Return the sums of rows, by a product: `sum` is slow where rows lie apart in memory."""
    return (rows.mT @ rows.new_ones(rows.shape[1], 1)).squeeze(-1)


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
