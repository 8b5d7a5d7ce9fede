"""The `patch` form: regress a layer's targets on the input patches under its kernel.

If only a rectifier reads the output, directly or behind a norm or a residual sum, only errors that
pass the rectifier count. Then there is a second solution: the targets are renewed with the outputs
of the first one (`RegressionTargets.renewed`; Zhang et al., *Accelerating Very Deep Convolutional
Networks*, TPAMI 2016, section 3.3). Further rounds bring no gain. Of both solutions and the kernel
as cut, the one with the smallest error behind the rectifier is written.

Patches of held-out images are kept for the comparisons, and those that are fitted to for the second
solution, as far as the memory allows. If it does not, the second solution takes them again in
another pass, and errors are measured on every n-th of the held-out images. So they are where these
have more rows than it takes to compare a few candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.data.splits import HELD_OUT_EVERY
from secateur.pruning.low_rank import LowRank
from secateur.pruning.refit.candidates import (
    RIDGES,
    Candidate,
    Choice,
    LayerBatch,
    Pass,
    Regression,
    best_of,
    descend,
    write,
)
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.least_squares import Gram, LeastSquares, Rows
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State
from secateur.pruning.refit.rows import from_patch_order, in_patch_order
from secateur.runtime import distributed

MAX_ROW_VALUES = 2**23
"""Values of patches taken at once (32 MiB)."""
ROWS_SHARE = 0.25
"""Fraction of a regression's memory for rows that are kept; the rest is for sums."""
COMPARED_ROWS = 4096
"""Rows that are enough to measure errors on."""


@dataclass(frozen=True, eq=False)
class RankLimit:
    """The rank that a kernel must have, in a layer that is replaced by two."""

    rank: int
    scale: Float[Tensor, "output"]
    """Scale of the norm behind the layer, or 1."""


Block = tuple[Float[Tensor, "group row input"], RegressionTargets]
"""Patches with their targets, by group."""


@dataclass(frozen=True)
class RowCounts:
    """How many rows a regression gets from all processes, and what it may hold of them."""

    fitted: int
    held_out: int
    """If no image is held out, errors are measured on the fitted rows."""
    groups: int
    inputs: int
    outputs: int
    limit_bytes: int

    @property
    def is_dual(self) -> bool:
        """Whether there are fewer rows than unknowns of an output."""
        return self.fitted < self.inputs

    @property
    def sum_bytes(self) -> int:
        """Memory of the sums, or of the rows in their place, and of what is computed from them."""
        unknowns = self.fitted if self.is_dual else self.inputs
        values = 4 * unknowns * unknowns + 6 * self.inputs * self.outputs
        if self.is_dual:
            values += self.fitted * (3 * self.inputs + 3 * self.outputs)
        return 8 * self.groups * values

    @property
    def fits(self) -> bool:
        """Whether the memory allows the regression."""
        return self.sum_bytes <= (1 - ROWS_SHARE) * self.limit_bytes

    @property
    def compared_every(self) -> int:
        """1 if errors are measured on all rows that there are for it, n if on every n-th image.

        With n twice as large there would be fewer than `COMPARED_ROWS`, or the memory does not
        allow more.
        """
        compared = self.held_out or self.fitted
        by_memory = -(-self._bytes(compared) // int(ROWS_SHARE * self.limit_bytes))
        return max(1, by_memory, compared // COMPARED_ROWS)

    @property
    def keeps_fitted(self) -> bool:
        """Whether all rows can be held in memory, those that are fitted to as well."""
        all_rows = self._bytes(self.fitted + self.held_out)
        return self.is_dual or all_rows <= ROWS_SHARE * self.limit_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of the sums and of the rows that are kept."""
        kept = self.fitted * self.keeps_fitted + self.held_out // self.compared_every
        return self.sum_bytes + self._bytes(kept)

    def _bytes(self, rows: int) -> int:
        return 4 * rows * self.groups * (self.inputs + 3 * self.outputs)


def count_rows(
    layers: Sequence[RefitLayer],
    kernel: Tensor,
    rows: tuple[int, int],
    limit_bytes: int,
) -> RowCounts:
    """Return the size of a regression on so many rows that are fitted to, and held out."""
    groups, outputs, inputs = in_patch_order(kernel, layers[0].groups).shape
    return RowCounts(*rows, groups, inputs, outputs, limit_bytes)


class PatchRegression(Regression):
    """Estimates a kernel from patches."""

    def __init__(
        self,
        layers: Sequence[RefitLayer],
        state: State,
        place: OffsetPlace | None,
        counts: RowCounts,
        *,
        rectified: bool,
        limit: RankLimit | None = None,
    ) -> None:
        self._layers = layers
        self._limit = limit
        self._state = state
        self._place = place
        self._counts = counts
        self._rectified = rectified
        self._weight = layers[0].layer.weight
        kernel, groups = state[self._weight], layers[0].groups
        old = in_patch_order(kernel, groups)
        offset = torch.zeros(old.shape[:2], dtype=torch.float64, device=kernel.device)
        method = Rows if counts.is_dual else Gram
        self._fit: LeastSquares = method(old, None if place else offset)
        self._renewed: LeastSquares = self._fit
        self._fitted: list[Block] = []
        self._compared: list[Block] = []
        self._as_cut = Candidate(None, old, offset)
        self._first = self._as_cut
        self._choice: Choice | None = None

    @property
    def passes(self) -> Sequence[Pass]:
        """One pass, or two if a rectified layer's rows can't be held in memory."""
        if self._rectified and not self._counts.keeps_fitted:
            return [(self._add, self._solve), (self._renew, self._solve_again)]
        return [(self._add, self._solve_at_once)]

    def choice(self) -> Choice:
        """Return the errors of the kernel that the last pass has written."""
        assert self._choice is not None
        return self._choice

    def _rows(self, number: int, batch: LayerBatch, images: Tensor) -> Iterator[Block]:
        """Yield patches and targets of some of the images, by group, in float32."""
        layer = self._layers[number]
        positions = batch.sampling.over(layer.positions)
        groups, _, inputs = self._as_cut.kernel.shape
        most = max(1, MAX_ROW_VALUES // (groups * inputs * positions.shape[1]))
        for chunk in images.nonzero()[:, 0].split(most):
            if len(chunk):
                rows = layer.patches(batch.inputs, positions[chunk.cpu()], chunk).float()
                yield rows, batch.targets.by_group(chunk, groups)

    def _add(self, number: int, batch: LayerBatch) -> None:
        is_compared = batch.held_out if self._counts.held_out else ~batch.held_out
        every = self._counts.compared_every
        if every > 1:
            is_nth = batch.sampling.numbers // HELD_OUT_EVERY % every == 0
            is_compared = is_compared & is_nth.to(is_compared.device)
        self._compared += self._rows(number, batch, is_compared)
        for rows, targets in self._rows(number, batch, ~batch.held_out):
            self._fit.add(rows, targets.wanted)
            if self._rectified and self._counts.keeps_fitted:
                self._fitted.append((rows, targets))

    def _solve(self) -> None:
        self._fit.merge()
        tried, errors = [self._as_cut], self._errors([self._as_cut], rectified=False)

        def error_of(number: int) -> float:
            candidate = self._solution(self._fit, RIDGES[number])
            (error,) = self._errors([candidate], rectified=False)
            tried.append(candidate)
            errors.append(error)
            return error

        descend(len(RIDGES), error_of)
        self._first, self._choice = best_of(tried, errors)
        if self._limit is not None:
            limited = self._of_low_rank(self._fit, self._first)
            errors = self._errors([self._as_cut, limited], rectified=False)
            self._first, self._choice = best_of([self._as_cut, limited], errors)
        self._renewed = self._fit.without_targets()

    def _solve_at_once(self) -> None:
        self._solve()
        if not self._rectified:
            self._write(self._first)
            return
        for rows, targets in self._fitted:
            self._add_renewed(rows, targets)
        self._solve_again()

    def _solution(self, sums: LeastSquares, ridge: float) -> Candidate:
        """Return a kernel and offset, rounded to the dtype of the network."""
        kernel, offset = sums.ridge(ridge)
        if self._place is not None:
            offset = self._place.rounded(self._state, offset)
        return Candidate(ridge, kernel.to(self._state[self._weight].dtype), offset)

    def _of_low_rank(self, sums: LeastSquares, candidate: Candidate) -> Candidate:
        """Return the nearest candidate of the rank that the kernel must have."""
        if self._limit is None or candidate.ridge is None:
            return candidate
        moments, mean = sums.moments(candidate.ridge)
        shape, kernel = self._state[self._weight].shape, candidate.kernel[0].double()
        low_rank = LowRank(kernel, moments[0], shape, self._limit.scale.to(kernel.device))
        nearest = low_rank.nearest(self._limit.rank)
        offset = candidate.offset + (kernel - nearest) @ mean[0]
        if self._place is not None:
            offset = self._place.rounded(self._state, offset)
        dtype = candidate.kernel.dtype
        return Candidate(candidate.ridge, nearest.to(dtype)[None], offset)

    def _renew(self, number: int, batch: LayerBatch) -> None:
        for rows, targets in self._rows(number, batch, ~batch.held_out):
            self._add_renewed(rows, targets)

    def _add_renewed(self, rows: Tensor, targets: RegressionTargets) -> None:
        outputs = _outputs(self._first, rows)
        self._renewed.add_targets(rows, targets.renewed(outputs))

    def _solve_again(self) -> None:
        self._renewed.merge_targets()
        second = self._solution(self._renewed, self._first.ridge or RIDGES[-1])
        second = self._of_low_rank(self._renewed, second)
        candidates = [self._as_cut, self._first, second]
        best, self._choice = best_of(candidates, self._errors(candidates, rectified=True))
        self._write(best)

    def _errors(self, candidates: Sequence[Candidate], *, rectified: bool) -> list[float]:
        """Return each candidate's squared error over the variance of the targets."""
        device = self._as_cut.offset.device
        errors = torch.zeros(len(candidates), dtype=torch.float64, device=device)
        count, sums = errors.new_zeros(()), errors.new_zeros(2, *self._as_cut.offset.shape)
        for rows, targets in self._compared:
            wanted = targets.wanted
            if rectified:
                wanted = targets.rectified(wanted)
            count += wanted.shape[1]
            sums += torch.stack([wanted.double().sum(1), wanted.double().square().sum(1)])
            for place, candidate in enumerate(candidates):
                outputs = _outputs(candidate, rows)
                if rectified:
                    outputs = targets.rectified(outputs)
                errors[place] += (outputs - wanted).square().sum(dtype=torch.float64)
        distributed.all_reduce_sum([errors, count, sums])
        mean, square = sums / count
        variance = (square - mean.square()).sum().clamp_min(1e-30)
        relative: list[float] = (errors / count / variance).tolist()
        return relative

    def _write(self, best: Candidate) -> None:
        shape = self._state[self._weight].shape
        kernel = from_patch_order(best.kernel, shape)
        chosen = Candidate(best.ridge, kernel, best.offset.flatten())
        write(self._state, self._weight, chosen, self._place)


def _outputs(candidate: Candidate, rows: Tensor) -> Float[Tensor, "group row output"]:
    return torch.baddbmm(candidate.offset[:, None].float(), rows, candidate.kernel.mT.float())
