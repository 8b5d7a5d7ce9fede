"""What the stages of a run compute, counted from the graph before anything is computed.

The counts follow the code: forward passes of images, multiply-accumulates of the linear algebra,
images that are read, and bytes that are held. `pipeline.estimate` makes seconds of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from secateur.config import Budget, RefitSection
from secateur.data.splits import HELD_OUT_EVERY
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.interpreter import PartialPass
from secateur.graph.network_graph import Tensors, argument
from secateur.graph.taps import all_taps, kernels_of
from secateur.pruning.allocation import SearchSpace, equal_fractions
from secateur.pruning.ranking import rank
from secateur.pruning.refit.layerwise import positions_of_image as refit_positions
from secateur.pruning.refit.patch_regression import RowCounts
from secateur.pruning.sensitivity import SNAPSHOTS
from secateur.scoring.criteria.elimination import ROUNDS
from secateur.scoring.criteria.reconstruction import (
    SINGLE,
    has_patches_enough,
    patch_windows,
    positions_of_image,
)

RIDGES_TRIED = 4
"""Ridges that a layer's regression solves for, with that of its second solution."""
COMPARED = RIDGES_TRIED + 3
"""Kernels whose errors are measured: those, the one as cut, and again behind the rectifier."""
NORM_FRACTIONS_TRIED = 4
"""Networks that the recalibration of batch norms compares on held-out images."""


@dataclass(frozen=True)
class Work:
    """What a stage computes, or a part of it."""

    passes: float = 0.0
    """Forward passes of one image through the original network."""
    float32: float = 0.0
    """Multiply-accumulates in float32, besides those of the passes."""
    float64: float = 0.0
    """Multiply-accumulates in float64."""
    copied: float = 0.0
    """Values that are gathered into rows of patches."""
    reads: float = 0.0
    """Images that are read, prepared and normalised."""

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> Work:
        """Return the same several times."""
        return Work(*(times * getattr(self, f.name) for f in fields(Work)))


def likely_cut(dependencies: DependencyGraph, target: Budget) -> Removed:
    """Return a cut to about the target: the same fraction everywhere.

    Where it is not known what a cut leaves of the quantity, as of the latency, its MACs count.
    """
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    ranking = rank(scores, dependencies, "uniform")
    steps = {n: range(ranking.least[n], len(order) + 1) for n, order in ranking.order.items()}

    def measure(counts: Mapping[str, int]) -> float:
        if target.quantity == "filters":
            return sum(counts.values())
        removed = ranking.removed(counts)
        is_params = target.quantity == "params"
        return dependencies.params(removed) if is_params else dependencies.macs(removed)

    whole = {name: counts[-1] for name, counts in steps.items()}
    space = SearchSpace(steps, measure, target.fraction_left * measure(whole))
    counts = equal_fractions(space) if space.fits(space.least) else space.least
    return ranking.removed(counts)


def cut_cost(dependencies: DependencyGraph, removed: Removed) -> float:
    """Return what a pass of the cut network costs, over one of the original.

    Of the MACs that a cut saves only a half saves time: layers with fewer channels use a machine
    worse, and what stands between the layers costs as much as before.
    """
    return (1 + dependencies.macs(removed) / max(1, dependencies.macs())) / 2


@dataclass(frozen=True)
class TapSize:
    """What `Reconstruction` computes with at a tap."""

    values: int
    """Of a patch."""
    filters: int
    outputs: int
    """Values that the consumers compute of a patch."""
    positions: int
    """Of the feature maps."""

    @property
    def rows(self) -> int:
        """Rows of the consumers' weights; see `eliminate`."""
        return min(self.outputs, self.values)


def tap_sizes(
    dependencies: DependencyGraph, state: Tensors, memory_bytes: float, images: int
) -> list[TapSize]:
    """Return the sizes of all taps; for `memory_bytes` see `Reconstruction`."""
    taps, kernels_by_tap = all_taps(dependencies), kernels_of(dependencies, state)
    windows = patch_windows(kernels_by_tap, memory_bytes)
    sizes: list[TapSize] = []
    for name, kernels in kernels_by_tap.items():
        window, tap = windows[name], taps[name]
        shape = tap.node.meta["val"].shape
        positions = math.prod(int(n) for dim, n in enumerate(shape) if dim not in (0, tap.dim))
        if not has_patches_enough(window.taps * kernels.filters, images, positions):
            window = SINGLE
        outputs = sum(
            math.prod(consumer.weights.shape[: 1 if consumer.window == window else 2])
            for consumer in kernels.consumers
        )
        sizes.append(TapSize(window.taps * kernels.filters, kernels.filters, outputs, positions))
    return sizes


def moments_work(taps: Sequence[TapSize], images: int) -> Work:
    """Return the sums of products of the scoring pass, once more for the held-out images."""
    rows = (images * min(positions_of_image(tap.filters, images), tap.positions) for tap in taps)
    products = sum(n * tap.values**2 for n, tap in zip(rows, taps, strict=True))
    return Work(float64=products * (1 + 1 / HELD_OUT_EVERY))


def elimination_work(taps: Sequence[TapSize]) -> Work:
    """Return the order of removal by `Reconstruction`; see `eliminate`."""
    total = 0.0
    for tap in taps:
        inverse = tap.values**3  # a Cholesky factor and what it gives
        downdates = tap.values**3 / 3 + tap.values**2 * tap.rows / 2
        offsets, rounds = tap.values // tap.filters, min(tap.filters, ROUNDS)
        costs = rounds / 2 * tap.values * tap.rows * offsets
        total += inverse + downdates + costs
    return Work(float64=total)


def passes_before(dependencies: DependencyGraph, parts: Iterable[PartialPass]) -> float:
    """Return how much of a forward pass, by MACs, lies before the last of the parts' beginnings."""
    position = {node: number for number, node in enumerate(dependencies.graph.nodes)}
    last = max((position[part.first] for part in parts), default=0)
    count = dependencies.count_after({})
    before = sum(layer.macs(count) for layer in dependencies.layers if position[layer.node] < last)
    return before / max(1, dependencies.macs())


def sensitivity_work(taps: Sequence[TapSize], images: int, passes: float) -> Work:
    """Return the sensitivity of all groups, measured so many times on one image.

    `passes` are the forward passes of an image, with the parts that run again behind each group.
    """
    double = single = 0.0
    for tap in taps:
        # The error curve: a factor, two systems, and two products of the consumers' weights.
        double += 7 / 3 * tap.values**3 + 2 * tap.rows * tap.values**2
        for fraction in SNAPSHOTS:
            kept = (1 - fraction) * tap.filters
            double += kept**3 / 3 + kept**2 * tap.filters
        single += tap.positions * tap.filters**2
    return Work(passes=images * passes, float32=images * single, float64=double)


@dataclass(frozen=True)
class Regression:
    """The size of a layer's least-squares problem in the cut network."""

    rows: int
    """Fitted rows of all images."""
    held_out: int
    groups: int
    inputs: int
    outputs: int

    def counts(self, limit_bytes: int) -> RowCounts:
        """Return what decides between the forms of regression."""
        return RowCounts(
            self.rows, self.held_out, self.groups, self.inputs, self.outputs, limit_bytes
        )

    def work(self, limit_bytes: int) -> Work:
        """Return what it takes: rows, sums of products, solutions, comparisons."""
        counts = self.counts(limit_bytes)
        rows, inputs, outputs = self.rows, self.inputs, self.outputs
        unknowns = rows if counts.is_dual else inputs
        solutions = RIDGES_TRIED * (unknowns**3 / 3 + 2 * unknowns**2 * outputs)
        if counts.is_dual:
            single = 0.0
            double = float(rows**2 * inputs + (RIDGES_TRIED + 1) * rows * inputs * outputs)
        else:
            single = rows * (inputs**2 / 2 + 3 * inputs * outputs)
            double = 0.0
        compared = (self.held_out or rows) / counts.compared_every
        single += COMPARED * compared * inputs * outputs
        passes = 1 if counts.keeps_fitted else 2
        copied = (passes * rows + compared) * inputs
        return Work(float32=single, float64=double + solutions, copied=copied) * self.groups


def regressions(
    dependencies: DependencyGraph, removed: Removed, settings: RefitSection, images: int
) -> list[Regression]:
    """Return the regressions of the refit: one for each kernel from the first cut on."""
    shapes, kept = dependencies.shapes_after(removed), dependencies.kept_indices(removed)
    held_out = images // HELD_OUT_EVERY
    result: list[Regression] = []
    seen: set[str] = set()
    for layer in dependencies.layers:
        lost = 1 - layer.filter_dim in kept.get(layer.weight, {})
        if layer.weight in seen or not (lost or (result and settings.layers == "downstream")):
            continue
        seen.add(layer.weight)
        shape = shapes.get(layer.weight, layer.shape)
        groups = _groups(layer, shape)
        outputs = max(1, shape[0] // groups)
        inputs = math.prod(shape[1:]) if settings.form == "patch" else shape[1]
        most = refit_positions(settings, images)
        positions = min(most, max(1, layer.positions))
        fitted = (images - held_out) * positions
        result.append(Regression(fitted, held_out * positions, groups, inputs, outputs))
    return result


def _groups(layer: Layer, shape: tuple[int, ...]) -> int:
    """Return the groups of a layer after a cut: of a depthwise one as many as it has filters."""
    groups = int(argument(layer.node, "groups", 1) or 1) if len(layer.shape) > 2 else 1
    return shape[0] if groups == layer.shape[0] else max(1, groups)
