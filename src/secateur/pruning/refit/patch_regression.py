"""Kernels from a regression of what a layer should answer on what its kernel meets.

Where only a rectifier reads the answer, right away or behind a norm or a residual sum, errors count
only where they come through it. After the first solution targets are renewed with what that one
answers (`Answer.renewed`) and it is solved again (Zhang et al., *Accelerating Very Deep
Convolutional Networks*, TPAMI 2016, section 3.3): once, since further rounds bring nothing. Of both
solutions and the kernel as cut the one is written that errs least behind the rectifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.graph.patches import from_patch_order, in_patch_order
from secateur.pruning.refit.candidates import (
    RIDGES,
    Candidate,
    Choice,
    LayerBatch,
    Pass,
    best_of,
    write,
)
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.least_squares import Gram
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets, State
from secateur.runtime import distributed

MAX_ROW_VALUES = 2**22
"""Values of patches held at a time (32 MiB in float64)."""


class PatchRegression:
    """See `estimates.Form`."""

    def __init__(
        self,
        consumers: Sequence[RefitLayer],
        state: State,
        place: OffsetPlace | None,
        *,
        rectified: bool,
    ) -> None:
        self._consumers = consumers
        self._state = state
        self._place = place
        self._weight = consumers[0].layer.weight
        kernel, groups = state[self._weight], consumers[0].groups
        old = in_patch_order(kernel.double(), groups)
        _, outputs, inputs = old.shape
        self._fit = Gram(groups, inputs, outputs, kernel.device)
        self._held_out = Gram(groups, inputs, outputs, kernel.device)
        self._rectified = rectified
        self._as_cut = Candidate(None, old, torch.zeros_like(self._fit.y))
        self._candidates: list[Candidate] = [self._as_cut]
        self._renewed = self._fit
        self._behind = Gram(groups, 0, outputs, kernel.device)
        self._errors = self._behind.count.new_zeros(3)
        self._choice: Choice | None = None

    @property
    def passes(self) -> Sequence[Pass]:
        """See `estimates.Form`."""
        first: list[Pass] = [(self._add, self._solve)]
        more: list[Pass] = [(self._renew, self._solve_again), (self._compare, self._choose)]
        return [*first, *more] if self._rectified else first

    def choice(self) -> Choice:
        """See `estimates.Form`."""
        assert self._choice is not None
        return self._choice

    def _rows(
        self, number: int, look: LayerBatch, images: Tensor
    ) -> Iterator[tuple[Tensor, RegressionTargets]]:
        """What the kernel meets in some of the images, and what it should answer; by group."""
        consumer = self._consumers[number]
        chosen = look.spread.over(consumer.positions)
        groups, _, inputs = self._as_cut.kernel.shape
        most = max(1, MAX_ROW_VALUES // (groups * inputs * chosen.shape[1]))
        for some in images.nonzero()[:, 0].split(most):
            if len(some):
                rows = consumer.patches(look.inputs[some], chosen[some.cpu()]).double()
                yield rows, look.target.parted(some, groups)

    def _add(self, number: int, look: LayerBatch) -> None:
        for gram, images in ((self._fit, ~look.held_out), (self._held_out, look.held_out)):
            for rows, answer in self._rows(number, look, images):
                gram.add(rows, answer.wanted)

    def _solve(self) -> None:
        distributed.all_reduce_sum([*self._fit.state(), *self._held_out.state()])
        check = self._held_out if self._held_out.count else self._fit
        candidates = [self._as_cut, *(self._solution(self._fit, ridge) for ridge in RIDGES)]
        errors = [
            float(check.squared_error(each.kernel, each.offset) / check.variance())
            for each in candidates
        ]
        best, self._choice = best_of(candidates, errors)
        if self._rectified:
            self._candidates.append(best)
            self._renewed = self._fit.without_targets()
        else:
            self._write(best)

    def _solution(self, sums: Gram, ridge: float) -> Candidate:
        """A kernel and offset, rounded to what the network can hold."""
        old = self._as_cut
        kernel, offset = sums.ridge(old.kernel, ridge, None if self._place else old.offset)
        if self._place is not None:
            offset = self._place.rounded(self._state, offset)
        return Candidate(ridge, kernel.to(self._state[self._weight].dtype).double(), offset)

    def _renew(self, number: int, look: LayerBatch) -> None:
        for rows, answer in self._rows(number, look, ~look.held_out):
            found = _answered(self._candidates[-1], rows)
            self._renewed.add_targets(rows, answer.renewed(found))

    def _solve_again(self) -> None:
        distributed.all_reduce_sum(self._renewed.target_state())
        ridge = self._candidates[-1].ridge or RIDGES[-1]
        self._candidates.append(self._solution(self._renewed, ridge))

    def _compare(self, number: int, look: LayerBatch) -> None:
        images = look.held_out if self._held_out.count else ~look.held_out
        for rows, answer in self._rows(number, look, images):
            wanted = answer.let_through(answer.wanted)
            self._behind.add(rows[:, :, :0], wanted)
            for place, candidate in enumerate(self._candidates):
                found = answer.let_through(_answered(candidate, rows))
                self._errors[place] += (found - wanted).square().sum()

    def _choose(self) -> None:
        distributed.all_reduce_sum([self._errors, *self._behind.state()])
        errors = self._errors / self._behind.count / self._behind.variance()
        best, self._choice = best_of(self._candidates, errors.tolist())
        self._write(best)

    def _write(self, best: Candidate) -> None:
        shape = self._state[self._weight].shape
        kernel = from_patch_order(best.kernel, shape)
        chosen = Candidate(best.ridge, kernel, best.offset.flatten())
        write(self._state, self._weight, chosen, self._place)


def _answered(candidate: Candidate, rows: Tensor) -> Float[Tensor, "group row output"]:
    return rows @ candidate.kernel.mT + candidate.offset[:, None]


def patch_bytes(consumer: RefitLayer, kernel: Tensor) -> int:
    """What the sums of the patch form take in memory, with all that is made of them at a time."""
    groups, outputs, inputs = in_patch_order(kernel, consumer.groups).shape
    return 8 * groups * inputs * (5 * inputs + 6 * outputs)
