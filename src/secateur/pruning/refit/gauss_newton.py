"""The least-squares problem of kernels that are estimated together, by one Gauss-Newton step.

The part of the network between them is linearised, and the normal equations are solved by a few
steps of conjugate gradients, each one product with the Jacobian and one with its transpose. They
are preconditioned kernel by kernel with the covariance of its inputs and the mean square of what
reaches its outputs (the Kronecker factors of Martens and Grosse, ICML 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.node import Node

from secateur.data import is_held_out
from secateur.data.splits import HELD_OUT_EVERY
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.patches import PositionSampling
from secateur.pruning.outcome import JointRefit
from secateur.pruning.refit.activation_cache import ActivationCache, CachedBatch
from secateur.pruning.refit.regression_targets import State
from secateur.pruning.refit.rows import in_patch_order, row_numbers
from secateur.pruning.refit.segment_function import (
    Direction,
    Seen,
    SegmentFunction,
    catch,
    gradients,
    requiring_gradients,
)
from secateur.pruning.refit.segments import Segment
from secateur.pruning.refit.target_layers import TargetLayer
from secateur.runtime import distributed
from secateur.runtime.device import sums_device

STEPS = 5
"""Steps of conjugate gradients."""
FRACTIONS = (1.0, 0.5, 0.25)
"""Fractions of the solution's way that are tried, the first that lowers the error is taken."""
SAMPLED = 32
"""Positions of an image that the covariance of a kernel's inputs is taken from."""
RIDGE = 1e-3
"""Added to a covariance and to the normal equations, as a multiple of the mean variance."""


@dataclass(frozen=True, eq=False)
class _LinearPart:
    """A batch's part of the linearised problem."""

    point: Direction
    outputs: list[Tensor]
    """The targets' values as a function of `point`, for gradients."""
    counts: Sequence[Tensor]
    """Where a change of the outputs counts."""
    seen: Seen


@dataclass(eq=False)
class SegmentProblem:
    """The least-squares problem of a segment."""

    segment: Segment
    kept: KeptChannels
    state: State
    cache: ActivationCache
    images: int
    """Images to use."""
    _factors: list[Tensor] = field(default_factory=list)
    """For each kernel the Cholesky factor of its inputs' second moments, with 1 as another input,
    `[group, value, value]`."""
    _scales: list[Tensor] = field(default_factory=list)
    """For each kernel the summed square of what reaches its outputs, `[group, output, 1]`."""
    _ridges: list[float] = field(default_factory=list)
    _linear: list[_LinearPart] = field(default_factory=list)
    """For each batch that has images which are fitted to."""

    def __post_init__(self) -> None:
        self._function = SegmentFunction(self.segment, self.kept, self.state)

    def solve(self) -> JointRefit:
        """Write the kernels that lower the error on the held-out images, if any do."""
        for batch in self.cache:
            if bool(self._used(batch).any()):
                batch.targets = [tuple(self._wanted(batch))]
        start = self._start()
        gradient = self._linearise(start)
        step = self._conjugate_gradients(gradient)
        before = error = self._error(start)
        best = start
        for fraction in FRACTIONS:
            moved = [
                (kernel + fraction * change, offset + fraction * shift)
                for (kernel, offset), (change, shift) in zip(start, step, strict=True)
            ]
            error = self._error(moved)
            if error < before:
                best = moved
                break
        else:
            error = before
        if best is not start:
            self._write(best)
        for batch in self.cache:
            batch.targets = []
        return JointRefit(self.segment.group, before, error)

    def _used(self, batch: CachedBatch) -> Tensor:
        """Return which of a batch's images are used: those with the first numbers."""
        return batch.indices < self.images

    def _is_fitted(self, batch: CachedBatch) -> Tensor:
        """Return which of a batch's images the kernels are fitted to."""
        return self._used(batch) & ~(is_held_out(batch.indices) & (self.images >= HELD_OUT_EVERY))

    def _wanted(self, batch: CachedBatch) -> list[Tensor]:
        """Return what the targets are in the original network, of a batch's images that count."""
        goals = [target.goal for target in self.segment.targets]  # one sum may be that of several
        values: dict[Node, Tensor] = {}
        full = batch.starts[self.segment.group][0].copy()
        full.advance(self.segment.behind_goals, after={node: catch(values, node) for node in goals})
        return [
            _of_images(batch, target, self.kept.select(node, values[node]))
            for node, target in zip(goals, self.segment.targets, strict=True)
        ]

    def _start(self) -> Direction:
        start = []
        for kernel in self.segment.kernels:
            values = in_patch_order(self.state[kernel.layer.layer.weight], kernel.layer.groups)
            start.append((values.float(), values.new_zeros(values.shape[:2]).float()))
        return start

    def _outputs(
        self, batch: CachedBatch, point: Direction, seen: Seen | None = None
    ) -> list[Tensor]:
        """Return the targets' values with other kernels and offsets, of the images that count."""
        outputs = self._function(batch.starts[self.segment.group][1], point, seen)
        return [
            _of_images(batch, target, output)
            for target, output in zip(self.segment.targets, outputs, strict=True)
        ]

    def _errors(
        self, batch: CachedBatch, outputs: Sequence[Tensor], chosen: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each target the error that counts, and where a change of the output counts.

        Behind a rectifier neither does where the original and the output are both off.
        """
        for target, wanted, output in zip(
            self.segment.targets, batch.targets[0], outputs, strict=True
        ):
            rows = chosen.repeat_interleave(target.layer.rows_per_image).to(output.device)
            rows = rows.view(-1, *[1] * (output.dim() - 1))
            counts = rows.expand_as(output)
            error = wanted - output
            if self.segment.rectified and target.rectified:
                counts = counts & ((wanted > 0) | (output > 0))
                error = wanted.relu() - torch.where(wanted > 0, output, output.relu())
            yield torch.where(counts, error, 0.0), counts

    def _fitted_batches(self) -> Iterator[tuple[CachedBatch, Tensor]]:
        for batch in self.cache:
            chosen = self._is_fitted(batch)
            if bool(chosen.any()):
                yield batch, chosen

    def _error(self, point: Direction) -> float:
        """Return the squared error on the held-out images over the targets' variance.

        Of fewer than five images none is held out: then it is that on all.
        """
        sums = [0.0] * 4
        for batch in self.cache:
            chosen = self._used(batch) & ~self._is_fitted(batch)
            if self.images < HELD_OUT_EVERY:
                chosen = ~chosen
            if not bool(chosen.any()):
                continue
            outputs = self._outputs(batch, point)
            for target, wanted, output in zip(
                self.segment.targets, batch.targets[0], outputs, strict=True
            ):
                index = chosen.repeat_interleave(target.layer.rows_per_image).to(output.device)
                expected, actual = wanted[index], output[index]
                if self.segment.rectified and target.rectified:
                    expected, actual = expected.relu(), actual.relu()
                parts = [(expected - actual).square(), expected, expected.square()]
                added = [*(float(part.sum()) for part in parts), float(expected.numel())]
                sums = [total + more for total, more in zip(sums, added, strict=True)]
        squared, total, square, count = distributed.sum_over_processes(sums)
        variance = max(square - total * total / max(count, 1.0), 1e-30)
        relative: float = squared / variance
        return relative

    def _linearise(self, start: Direction) -> Direction:
        """Return the gradient, and keep what the preconditioner needs."""
        kernels = self.segment.kernels
        gradient = [(torch.zeros_like(k), torch.zeros_like(o)) for k, o in start]
        place = sums_device(start[0][0].device)
        scales = [offset.to(place).double() for _, offset in gradient]
        moments = [
            torch.zeros(
                *(k.shape[0], k.shape[2] + 1, k.shape[2] + 1), dtype=torch.float64, device=place
            )
            for k, _ in start
        ]
        for batch, chosen in self._fitted_batches():
            with torch.enable_grad():
                point = requiring_gradients(start)
                seen: Seen = {}
                outputs = self._outputs(batch, point, seen)
            errors, counts = zip(*self._errors(batch, outputs, chosen), strict=True)
            _add(gradient, gradients(outputs, point, errors))
            self._linear.append(_LinearPart(point, outputs, counts, seen))
            signs = [
                _random_signs(row_numbers(batch.indices, target.layer.rows_per_image), count)
                * count
                for target, count in zip(self.segment.targets, counts, strict=True)
            ]
            values = [seen[kernel.layer.node][1] for kernel in kernels]
            reaching = torch.autograd.grad(outputs, values, signs, retain_graph=True)
            for number, kernel in enumerate(kernels):
                layer = kernel.layer
                used = chosen.repeat_interleave(layer.rows_per_image).nonzero()[:, 0]
                squares = layer.maps(reaching[number]).square().sum((0, 2)).to(place).double()
                factor = self._function.scales[number].to(squares)
                scales[number] += squares.view_as(factor) * factor.square()
                sampling = PositionSampling(
                    row_numbers(batch.indices, layer.rows_per_image), SAMPLED, 0.0
                )
                positions = sampling.over(layer.positions)[used]
                rows = layer.patches(seen[layer.node][0].detach(), positions, used).float()
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
                moments[number] += (rows.mT @ rows).to(place)
        parts = [part for pair in gradient for part in pair]
        distributed.all_reduce_sum([*parts, *scales, *moments])
        for moment, scale in zip(moments, scales, strict=True):
            count = moment[0, -1, -1].clamp_min(1.0)
            moment /= count
            ridge = RIDGE * float(moment.diagonal(dim1=1, dim2=2)[:, :-1].mean())
            moment.diagonal(dim1=1, dim2=2).add_(max(ridge, 1e-12))
            self._factors.append(torch.linalg.cholesky(moment))
            floor = 1e-3 * scale.mean().clamp_min(torch.finfo(torch.float32).tiny)
            self._scales.append(torch.maximum(scale, floor)[..., None])
            self._ridges.append(ridge * float(scale.mean()))
        return self._allowed(gradient)

    def _preconditioned(self, direction: Direction) -> Direction:
        result = []
        for (kernel, offset), factor, scale in zip(
            direction, self._factors, self._scales, strict=True
        ):
            joined = torch.cat([kernel, offset[..., None]], 2).to(factor.device).double() / scale
            solved = torch.cholesky_solve(joined.mT, factor).mT.to(kernel)
            result.append((solved[..., :-1], solved[..., -1]))
        return self._allowed(result)

    def _allowed(self, direction: Direction) -> Direction:
        """Return a direction without the rows and offsets that may not change."""
        result = []
        for (kernel, offset), owner in zip(direction, self.segment.kernels, strict=True):
            rows = owner.rows.to(kernel.device)
            shift = torch.zeros_like(offset) if owner.place is None else offset * rows
            result.append((kernel * rows[..., None], shift))
        return result

    def _normal_product(self, direction: Direction) -> Direction:
        """Return J'J times a direction, J being the Jacobian of what counts at the targets."""
        result = [(torch.zeros_like(k), torch.zeros_like(o)) for k, o in direction]
        for (batch, _), part in zip(self._fitted_batches(), self._linear, strict=True):
            start = batch.starts[self.segment.group][1]
            changes = self._function.changes(start, part.seen, direction)
            counted = [
                change[: len(count)] * count
                for change, count in zip(changes, part.counts, strict=True)
            ]
            _add(result, gradients(part.outputs, part.point, counted))
        distributed.all_reduce_sum([part for pair in result for part in pair])
        for (kernel, _), (change, _), ridge in zip(result, direction, self._ridges, strict=True):
            kernel.add_(change, alpha=ridge)
        return self._allowed(result)

    def _conjugate_gradients(self, gradient: Direction) -> Direction:
        """Return the approximate solution of the normal equations after `STEPS` steps."""
        solution = [(torch.zeros_like(k), torch.zeros_like(o)) for k, o in gradient]
        residual = gradient
        improved = self._preconditioned(residual)
        along, square = improved, _dot(residual, improved)
        for step in range(STEPS):
            product = self._normal_product(along)
            curvature = _dot(along, product)
            if not curvature > 0:
                break
            _add(solution, along, square / curvature)
            residual = _sum(residual, product, -square / curvature)
            if step == STEPS - 1:
                break
            improved = self._preconditioned(residual)
            last, square = square, _dot(residual, improved)
            along = _sum(improved, along, square / last)
        return solution

    def _write(self, point: Direction) -> None:
        for kernel, (values, offset) in zip(self.segment.kernels, point, strict=True):
            weight = kernel.layer.layer.weight
            old = self.state[weight]
            self.state[weight] = torch.empty_like(old).copy_(kernel.shaped(values, old))
            if kernel.place is not None:
                kernel.place.write(self.state, offset.double())


def _of_images(batch: CachedBatch, target: TargetLayer, value: Tensor) -> Tensor:
    """Return the rows of the images to count, of the value at a target."""
    return value[: len(batch.indices) * target.layer.rows_per_image]


def _random_signs(numbers: Tensor, like: Tensor) -> Tensor:
    """Return -1 or 1 for each value of each row, which depend on the row's number alone."""
    signs = [
        torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(number))
        .sub_(0.5)
        .sign_()
        for number in numbers.tolist()
    ]
    return torch.stack(signs).to(like.device)


def _add(total: Direction, added: Direction, factor: float = 1.0) -> None:
    for (kernel, offset), (k, o) in zip(total, added, strict=True):
        kernel.add_(k, alpha=factor)
        offset.add_(o, alpha=factor)


def _sum(left: Direction, right: Direction, factor: float) -> Direction:
    return [
        (kernel + factor * k, offset + factor * o)
        for (kernel, offset), (k, o) in zip(left, right, strict=True)
    ]


def _dot(left: Direction, right: Direction) -> float:
    return math.fsum(
        float((a * b).sum())
        for pair, other in zip(left, right, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
