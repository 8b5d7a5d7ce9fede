"""The `patch` form: regress a layer's targets on the input patches under its kernel.

If only a rectifier reads the output, directly or behind a norm or a residual sum, only errors that
pass the rectifier count. Then there is a second solution: the targets are renewed with the outputs
of the first one (`RegressionTargets.renewed`; Zhang et al., *Accelerating Very Deep Convolutional
Networks*, TPAMI 2016, section 3.3). Further rounds bring no gain. Of both solutions and the kernel
as cut, the one with the smallest error behind the rectifier is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruning.refit.candidates import (
    RIDGES,
    Candidate,
    Choice,
    LayerBatch,
    Pass,
    Regression,
    best_of,
    write,
)
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.least_squares import Gram
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State
from secateur.pruning.refit.rows import from_patch_order, in_patch_order
from secateur.runtime import distributed

MAX_ROW_VALUES = 2**22
"""Values of patches held at once (32 MiB in float64)."""


class PatchRegression(Regression):
    """Estimates a kernel from patches."""

    def __init__(
        self,
        layers: Sequence[RefitLayer],
        state: State,
        place: OffsetPlace | None,
        *,
        rectified: bool,
    ) -> None:
        self._layers = layers
        self._state = state
        self._place = place
        self._weight = layers[0].layer.weight
        kernel, groups = state[self._weight], layers[0].groups
        old = in_patch_order(kernel.double(), groups)
        _, outputs, inputs = old.shape
        self._fit = Gram(groups, inputs, outputs, kernel.device)
        self._held_out = Gram(groups, inputs, outputs, kernel.device)
        self._rectified = rectified
        self._as_cut = Candidate(None, old, torch.zeros_like(self._fit.y))
        self._candidates: list[Candidate] = [self._as_cut]
        self._renewed = self._fit
        self._rectified_targets = Gram(groups, 0, outputs, kernel.device)
        self._errors = self._rectified_targets.count.new_zeros(3)
        self._choice: Choice | None = None

    @property
    def passes(self) -> Sequence[Pass]:
        """Passes to solve; with a rectifier also to solve again and to compare."""
        first: list[Pass] = [(self._add, self._solve)]
        more: list[Pass] = [(self._renew, self._solve_again), (self._compare, self._choose)]
        return [*first, *more] if self._rectified else first

    def choice(self) -> Choice:
        """Return the errors of the kernel that the last pass has written."""
        assert self._choice is not None
        return self._choice

    def _rows(
        self, number: int, batch: LayerBatch, images: Tensor
    ) -> Iterator[tuple[Tensor, RegressionTargets]]:
        """Yield patches and targets of some of the images, by group."""
        layer = self._layers[number]
        positions = batch.sampling.over(layer.positions)
        groups, _, inputs = self._as_cut.kernel.shape
        most = max(1, MAX_ROW_VALUES // (groups * inputs * positions.shape[1]))
        for chunk in images.nonzero()[:, 0].split(most):
            if len(chunk):
                rows = layer.patches(batch.inputs[chunk], positions[chunk.cpu()]).double()
                yield rows, batch.targets.by_group(chunk, groups)

    def _add(self, number: int, batch: LayerBatch) -> None:
        for gram, images in ((self._fit, ~batch.held_out), (self._held_out, batch.held_out)):
            for rows, targets in self._rows(number, batch, images):
                gram.add(rows, targets.wanted)

    def _solve(self) -> None:
        distributed.all_reduce_sum([*self._fit.state(), *self._held_out.state()])
        check = self._held_out if self._held_out.count else self._fit
        candidates = [self._as_cut, *(self._solution(self._fit, ridge) for ridge in RIDGES)]
        errors = [
            float(check.squared_error(candidate.kernel, candidate.offset) / check.variance())
            for candidate in candidates
        ]
        best, self._choice = best_of(candidates, errors)
        if self._rectified:
            self._candidates.append(best)
            self._renewed = self._fit.without_targets()
        else:
            self._write(best)

    def _solution(self, sums: Gram, ridge: float) -> Candidate:
        """Return a kernel and offset, rounded to the dtype of the network."""
        old = self._as_cut
        kernel, offset = sums.ridge(old.kernel, ridge, None if self._place else old.offset)
        if self._place is not None:
            offset = self._place.rounded(self._state, offset)
        return Candidate(ridge, kernel.to(self._state[self._weight].dtype).double(), offset)

    def _renew(self, number: int, batch: LayerBatch) -> None:
        for rows, targets in self._rows(number, batch, ~batch.held_out):
            outputs = _outputs(self._candidates[-1], rows)
            self._renewed.add_targets(rows, targets.renewed(outputs))

    def _solve_again(self) -> None:
        distributed.all_reduce_sum(self._renewed.target_state())
        ridge = self._candidates[-1].ridge or RIDGES[-1]
        self._candidates.append(self._solution(self._renewed, ridge))

    def _compare(self, number: int, batch: LayerBatch) -> None:
        images = batch.held_out if self._held_out.count else ~batch.held_out
        for rows, targets in self._rows(number, batch, images):
            wanted = targets.rectified(targets.wanted)
            self._rectified_targets.add(rows[:, :, :0], wanted)
            for place, candidate in enumerate(self._candidates):
                outputs = targets.rectified(_outputs(candidate, rows))
                self._errors[place] += (outputs - wanted).square().sum()

    def _choose(self) -> None:
        distributed.all_reduce_sum([self._errors, *self._rectified_targets.state()])
        targets = self._rectified_targets
        errors = self._errors / targets.count / targets.variance()
        best, self._choice = best_of(self._candidates, errors.tolist())
        self._write(best)

    def _write(self, best: Candidate) -> None:
        shape = self._state[self._weight].shape
        kernel = from_patch_order(best.kernel, shape)
        chosen = Candidate(best.ridge, kernel, best.offset.flatten())
        write(self._state, self._weight, chosen, self._place)


def _outputs(candidate: Candidate, rows: Tensor) -> Float[Tensor, "group row output"]:
    return rows @ candidate.kernel.mT + candidate.offset[:, None]


def patch_bytes(layer: RefitLayer, kernel: Tensor) -> int:
    """Return the memory of the patch form's sums and of everything computed from them at once."""
    groups, outputs, inputs = in_patch_order(kernel, layer.groups).shape
    return 8 * groups * inputs * (5 * inputs + 6 * outputs)
