"""Criteria `vote` and `reconstruction`: remove filters one by one, reconstruct each from the rest.

Over all positions this is a baseline from the literature, `reconstruction`; inside the regions of
concepts it is the default vote, `vote`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.data.splits import is_held_out
from secateur.graph.groups import Group
from secateur.graph.input_edit import ChannelReconstruction
from secateur.graph.patches import Window
from secateur.graph.taps import Kernels, taps_of
from secateur.runtime.errors import UsageError
from secateur.scoring.covariance import SecondMoments, quantization_unit, quantize
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Regions
from secateur.scoring.criteria.elimination import eliminate, error_curve, with_ridge
from secateur.scoring.criteria.kernels import l1, mean_over_producers
from secateur.scoring.criteria.votes import VoteSettings

POSITIONS = 16
"""Positions sampled from each image, spread evenly and differently in every image…"""
FEWEST_POSITIONS = 4096
"""…but so many of all images together, where maps have them…"""
POSITIONS_PER_VALUE = 12
"""…and so many for each filter. About a quarter of them lie in the regions of concepts. Filters are
compared in patches if there are so many for each value of a patch (k²c), and otherwise at single
positions: the covariance of patches would be noise. For that `POSITIONS` of an image count, because
further ones are much the same (docs/research/vote.md)."""
MOST_VALUES = 4608
"""Above this size of patch filters are compared at single positions, too."""
WEIGHT_UNITS = 16
"""Weights of positions are rounded to multiples of 1 / 16."""
NORM_WEIGHT = 3
"""Behind a batch norm the votes for a filter are multiplied by this power of the L1 norm of the
kernel that produces it.

Under weight decay the norm says how much training relied on the filter. Activations don't, because
the batch norm rescales them. Chosen on validation images (docs/explanation/criteria.md)."""
SINGLE = Window((1, 1))
"""A single position."""


class Reconstruction:
    """A filter's place in the order of removal, where each step removes the least missed filters.

    What is missed of a filter is the part of the consumers' inputs that least squares on patches
    can't reconstruct from the remaining filters: the layer-wise reconstruction of ThiNet (Luo et
    al., ICCV 2017, eq. 6), solved backwards as in Optimal Brain Surgeon (Hassibi and Stork, NIPS
    1993, eq. 5).

    Without vote settings every position counts, which is the baseline. With them it is a vote in
    rounds, as in an instant runoff: the voting units are the positions inside the regions of
    concepts. A unit's vote for a filter is the squared error of the consumers there without it;
    behind a batch norm it counts the more, the larger the kernel that produces the filter
    (`NORM_WEIGHT`). The filter with the fewest votes is removed, and its votes pass on to the
    filters that reconstruct it.
    """

    def __init__(self, vote: VoteSettings | None = None, memory_bytes: float = math.inf) -> None:
        """Score by votes, or without settings by all positions.

        What the second moments and the elimination take is kept below `memory_bytes`: for that the
        largest patches are replaced by single positions, as above `MOST_VALUES`.
        """
        self._vote, self._memory_bytes = vote, memory_bytes
        baseline: frozenset[Need] = frozenset({"maps", "statistics"})
        with_concepts: frozenset[Need] = frozenset({"maps", "statistics", "concepts"})
        self.needs: frozenset[Need] = baseline if vote is None else with_concepts
        self._kernels: Mapping[str, Kernels] = {}
        self._windows: dict[str, Window] = {}
        self._samples: dict[str, _Sample] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._kernels = taps
        self._windows = patch_windows(taps, self._memory_bytes)
        self._samples = {}

    def update(self, features: FeatureBatch) -> DeferredUpdate | None:
        """Add patches at sampled positions; with vote settings their weights need the concepts."""
        if features.tap not in self._samples:
            self._samples[features.tap] = _sample_of(
                features, self._windows[features.tap], has_votes=self._vote is not None
            )
        sample, vote = self._samples[features.tap], self._vote
        rows, columns = sample.window.positions(*features.maps.shape[2:])
        positions = _spread(features.indices, rows, columns, sample.positions)
        images = torch.arange(len(features.maps))
        # [image, position, value]
        patches = sample.window.patches(features.maps, positions, images)
        patches = quantize(patches, sample.units, features.tap)
        held_out = is_held_out(features.indices)
        counted = patches if vote is None else patches[:, : sample.fewest]
        sample.moments.update(counted.flatten(0, 1))
        sample.held_out.update(counted[held_out].flatten(0, 1))
        if vote is None:
            return None

        def add_weighted(regions: Regions) -> None:
            masks = regions.masks_at((rows, columns))
            inside = masks.flatten(2).float()  # [image, region, position]
            weights = torch.einsum("irp,ir->ip", inside, vote.weigh(regions.concepts).float())
            index = positions.to(weights.device)
            weights = (weights.gather(1, index) * WEIGHT_UNITS).round()
            sample.votes.update(patches.flatten(0, 1), weights.flatten())

        return add_weighted

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (tensor for sample in self._samples.values() for tensor in sample.state())

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the places: the filter that is removed first has 0."""
        kernels, sample = self._kernels[tap], self._samples[tap]
        norm_weights = None if self._vote is None else _norm_weights(tap, kernels)
        consumers = _consumers(kernels, sample.window)
        order = eliminate(
            sample.votes.covariance(sample.units), consumers, kernels.filters, norm_weights
        )
        places = torch.zeros(kernels.filters, dtype=torch.float64)
        places[torch.tensor(order)] = torch.arange(kernels.filters, dtype=torch.float64)
        return places

    def errors(self, tap: str, ranking: Sequence[int]) -> Float[Tensor, "count"]:
        """Return the consumers' summed squared error without 0, 1, … up to all filters of a tap.

        Filters are removed in reverse order of `ranking`, and reconstructed by least squares from
        the remaining ones. The least squares are those of four fifths of the images, and the error
        is that on the others: on the same images, the error of a layer with many filters is that of
        a fit to noise. No further pass is needed, whatever the ranking.

        Of fewer than five images none is held out; then all of them give both.
        """
        kernels, sample = self._kernels[tap], self._samples[tap]
        consumers = _consumers(kernels, sample.window)
        if not sample.held_out.is_empty:
            fitted = sample.moments.without(sample.held_out)
            held_out = sample.held_out.about(fitted.mean(sample.units), sample.units)
            return error_curve(fitted.covariance(sample.units), consumers, ranking, held_out).cpu()
        return error_curve(sample.covariance(), consumers, ranking).cpu()

    def mean(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the mean activations of a tap's filters."""
        sample = self._samples[tap]
        return sample.moments.mean(sample.units)[sample.centre]

    def reconstruction(
        self, tap: str, kept: Sequence[int]
    ) -> tuple[Float[Tensor, "filter filter"], Float[Tensor, "filter"]]:
        """Return the matrix and the offset that reconstruct a tap's filters from those kept.

        These are the `channel` form of the refit: a filter is reconstructed from the filters kept
        at the same position.
        """
        sample = self._samples[tap]
        covariance = sample.covariance(sample.centre)
        mean = self.mean(tap)
        index = torch.tensor(kept)
        inner = with_ridge(covariance)[index][:, index]
        matrix = torch.zeros_like(covariance)
        matrix[:, index] = torch.linalg.solve(inner, covariance[index]).T
        matrix[index] = torch.eye(len(mean), dtype=torch.float64)[index].to(matrix.device)
        return matrix, mean - matrix @ mean


@dataclass(frozen=True, eq=False)
class _Sample:
    """What is sampled of a tap's feature maps, and its sums."""

    window: Window
    positions: int
    """Number of positions from each image, where its maps have so many."""
    fewest: int
    """Number of positions from each image that suffice if all of them count alike."""
    units: Float[Tensor, "value"]
    moments: SecondMoments
    """Those of all positions alike."""
    held_out: SecondMoments
    """The part of the moments that the held-out images have (`data.is_held_out`)."""

    votes: SecondMoments
    """The moments weighed by votes; without vote settings, `moments`."""

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        kinds = {id(kind): kind for kind in (self.moments, self.held_out, self.votes)}
        return (tensor for kind in kinds.values() for tensor in kind.state())

    def covariance(self, part: slice = slice(None)) -> Float[Tensor, "part part"]:
        """Return the covariance of the values, or of a part of them."""
        return self.moments.covariance(self.units, part)

    @property
    def centre(self) -> slice:
        """The values of a patch at its centre."""
        filters, offset = len(self.units) // self.window.taps, self.window.taps // 2
        return slice(offset * filters, (offset + 1) * filters)


def _sample_of(features: FeatureBatch, window: Window, *, has_votes: bool) -> _Sample:
    """Return what to sample of a tap, at best by `window`, in view of how many images there are."""
    kernels, statistics = features.kernels, features.statistics
    assert statistics is not None
    images = statistics.images
    positions = math.prod(window.positions(*features.maps.shape[2:]))
    if not has_patches_enough(window.taps * kernels.filters, images, positions):
        window = SINGLE
    units = quantization_unit(statistics).repeat(window.taps)
    positions = positions_of_image(kernels.filters, images)
    fewest = -(-max(FEWEST_POSITIONS, POSITIONS_PER_VALUE * len(units)) // images)
    moments, held_out, votes = (SecondMoments(len(units), kernels.device) for _ in range(3))
    return _Sample(
        window, positions, fewest, units, moments, held_out, votes if has_votes else moments
    )


def has_patches_enough(values: int, images: int, positions: int) -> bool:
    """Return whether maps of so many positions give enough patches of so many values."""
    return images * min(POSITIONS, positions) >= POSITIONS_PER_VALUE * values


def positions_of_image(filters: int, images: int) -> int:
    """Return how many positions are sampled from each image, if its maps have so many."""
    wanted = max(FEWEST_POSITIONS, POSITIONS_PER_VALUE * filters)
    return max(POSITIONS, -(-wanted // images))


def _norm_weights(tap: str, kernels: Kernels) -> Float[Tensor, "filter"] | None:
    """Return what the votes for each filter are multiplied by, or None for no weights.

    There are none without a batch norm, since then activations are as large as the kernels make
    them, and if no kernel produces a filter. A norm that was folded into the kernel and put back
    counts as none: the kernel is then as large as its activations, not as training left it.
    """
    if not kernels.norm_scales or not kernels.is_rescaled:
        return None
    try:
        norms = mean_over_producers(l1, tap, kernels)
    except UsageError:
        return None
    weights = (norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)) ** NORM_WEIGHT
    return weights.to(kernels.device)


def patch_windows(taps: Mapping[str, Kernels], memory_bytes: float) -> dict[str, Window]:
    """Return the patches that filters are compared in at every tap, so that they fit in memory."""
    windows = {name: _window(kernels) for name, kernels in taps.items()}

    def values(name: str) -> int:
        return windows[name].taps * taps[name].filters

    def needed() -> int:
        sizes = list(map(values, taps))
        return moments_bytes(sizes) + elimination_bytes(sizes)

    for name in sorted(taps, key=values, reverse=True):
        if needed() <= memory_bytes:
            break
        windows[name] = SINGLE
    return windows


def moments_bytes(values: Sequence[int]) -> int:
    """Return the memory of second moments of patches with so many values each.

    They are those of all positions, of the held-out images, and weighed by votes.
    """
    return 8 * 3 * sum((count + 1) ** 2 for count in values)


def elimination_bytes(values: Sequence[int]) -> int:
    """Return the memory of the largest elimination, beside the moments.

    It holds a covariance, the same by filter, its factor, its inverse and the consumers' weights.
    The error curve holds the sums and covariances of both parts of the images, and their products.
    """
    return 8 * 8 * max(values, default=0) ** 2


def _window(kernels: Kernels) -> Window:
    """Return the patches that filters are compared in: the first consumer's, if not too large."""
    window = kernels.consumers[0].window if kernels.consumers else SINGLE
    return window if window.taps * kernels.filters <= MOST_VALUES else SINGLE


def _consumers(kernels: Kernels, window: Window) -> Float[Tensor, "output value"]:
    """Return all consumers' weights on one window; offsets of other windows count as outputs."""
    rows = [torch.zeros(0, window.taps, kernels.filters, device=kernels.device)]
    for consumer in kernels.consumers:
        weights = consumer.weights
        if consumer.window != window:
            outputs = weights.shape[0] * weights.shape[1]
            centre = rows[0].new_zeros(outputs, *rows[0].shape[1:])
            centre[:, window.taps // 2] = weights.flatten(0, 1)
            weights = centre
        rows.append(weights)
    return torch.cat(rows).flatten(1)


def _spread(
    indices: Int[Tensor, "image"], rows: int, columns: int, positions: int
) -> Int[Tensor, "image position"]:
    """Return `positions` of each image, or all if it has no more.

    They depend on its index alone: the points of an additive recurrence in two dimensions (Roberts,
    2018, the R2 sequence).
    """
    if positions >= rows * columns:
        return torch.arange(rows * columns).expand(len(indices), -1)
    step = (indices[:, None] * positions + torch.arange(positions)).double()
    row = ((0.5 + step * 0.7548776662466927) % 1 * rows).long()
    column = ((0.5 + step * 0.5698402909980532) % 1 * columns).long()
    return row * columns + column


def group_error_curve(
    group: Group, moments: Reconstruction, ranking: Sequence[int]
) -> Float[Tensor, "count"]:
    """Return the consumers' squared error when 0, 1, … up to all channels are removed."""
    place = torch.empty(len(group), dtype=torch.int64)
    place[torch.tensor(ranking)] = torch.arange(len(group))
    total = torch.zeros(len(group) + 1, dtype=torch.float64)
    for part, tap in taps_of(group).items():
        places = place[torch.from_numpy(tap.channel)]
        errors = moments.errors(part, places.argsort(stable=True).tolist())
        kept = torch.arange(len(group), -1, -1)  # 0, 1, … channels removed
        removed = (places[:, None] >= kept).sum(0)
        total += errors[removed]
    return total


def reconstruct_channels(
    group: Group, moments: Reconstruction, kept: Sequence[int]
) -> ChannelReconstruction:
    """Return the best linear estimate of a group's channels from the kept ones.

    It is the mean alone if consumers read channels at several taps or through several filters each.
    """
    (part, tap), *more = taps_of(group).items()
    channel = torch.from_numpy(tap.channel)
    if not more and torch.equal(channel.sort().values, torch.arange(len(group))):
        filters = channel.argsort()  # of each channel
        matrix, offset = moments.reconstruction(part, filters[torch.tensor(kept)].tolist())
        return ChannelReconstruction(matrix[filters][:, filters].float(), offset[filters].float())
    stays = torch.zeros(len(group))
    stays[torch.tensor(kept)] = 1
    total, count = torch.zeros(2, len(group), dtype=torch.float64)
    for name, tap in taps_of(group).items():
        index = torch.from_numpy(tap.channel)
        total.index_add_(0, index, moments.mean(name).cpu())
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return ChannelReconstruction(stays.diag(), (1 - stays) * (total / count).float())
