"""What the network's answer suffers when filters of one group go: a curve for each group.

Two things are known of a group. The *error curve* says what its readers miss, squared and summed,
when the worst 1, 2, … filters are gone and the others stand in for them; it follows from the second
moments that were taken in the scoring pass (`Reconstruction.errors`). How much such an error
matters at the network's output is measured: on some calibration images filters are replaced by what
the others tell of them, at the readers of one group at a time, and the growth of the output's error
over that of the readers' is the group's *slope*. Damage is the one times the other: so curves of
all groups are in one unit, and smooth where measurements on few images are not.

No label is used. Where the network gives one row of scores an image the output's error is the
divergence of its softened softmax from the original's, otherwise the squared difference over the
variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.data import Batch
from secateur.evaluation.divergence import divergence_by_image
from secateur.graph.channel_ids import Consumer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.interpreter import GraphInterpreter, apply
from secateur.graph.trace import Compute, Tensors
from secateur.pruning.ranking import Ranking
from secateur.runtime import distributed
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import images_at_a_time
from secateur.scoring.criteria.reconstruction import Reconstruction
from secateur.scoring.taps import taps_of

SNAPSHOTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a group that are taken out to measure its slope."""
PIXELS = 2**21
"""Images that the slopes are measured on have so many pixels together…"""
FEWEST_IMAGES, MOST_IMAGES = 32, 256
"""…but are not fewer or more than these."""
TEMPERATURE = 4.0
"""Softens answers: where a network is sure of nearly every image, few images say all otherwise."""
SMALLEST_GROWTH = 1e-7
"""Output errors below are rounding."""

Sensitivity = Mapping[str, Sequence[float]]
"""`{group: damage when 0, 1, … up to all of its channels go, the last of the ranking first}`."""


@dataclass(frozen=True, eq=False)
class ChannelReconstruction:
    """Replaces channels of a group by what the kept ones tell of them: `matrix x + offset`."""

    matrix: Float[Tensor, "channel channel"]
    offset: Float[Tensor, "channel"]


def measure_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    moments: Reconstruction,
    ranking: Ranking,
    batches: Iterable[Batch],
    *,
    progress: ProgressCallback = no_progress,
) -> Sensitivity:
    """The damage curve of every group, from moments of the scoring pass and some calibration
    images."""
    curves = {
        name: error_curve(group, moments, ranking.order[name])
        for name, group in dependencies.groups.items()
    }
    slopes = measure_output_sensitivity(
        state, dependencies, moments, ranking, batches, progress=progress
    )
    return {name: (slopes[name] * curve).tolist() for name, curve in curves.items()}


def error_curve(
    group: Group, moments: Reconstruction, ranking: Sequence[int]
) -> Float[Tensor, "count"]:
    """What the readers of a group miss when 0, 1, … up to all of its channels go."""
    place = torch.empty(len(group), dtype=torch.int64)
    place[torch.tensor(ranking)] = torch.arange(len(group))
    total = torch.zeros(len(group) + 1, dtype=torch.float64)
    for part, look in taps_of(group).items():
        places = place[torch.from_numpy(look.channel)]
        errors = moments.errors(part, places.argsort(stable=True).tolist())
        stay = torch.arange(len(group), -1, -1)  # 0, 1, … channels gone
        gone = (places[:, None] >= stay).sum(0)
        total += errors[gone]
    return total


def measure_output_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    moments: Reconstruction,
    ranking: Ranking,
    batches: Iterable[Batch],
    *,
    progress: ProgressCallback = no_progress,
) -> dict[str, float]:
    """By group: the output's error for each unit of its readers' error, a geometric mean.

    Over the `SNAPSHOTS`; 0 where nothing that goes makes a difference. All processes bring the same
    batches; each measures its share of the groups.
    """
    position = {node: number for number, node in enumerate(dependencies.graph.nodes)}
    ordered = sorted(
        dependencies.groups.values(),
        key=lambda group: min(position[r.node] for r in group.consumers),
    )
    snapshots = {
        group.name: [
            reconstruct_channels(group, moments, ranking.order[group.name][:-gone])
            for gone in sorted({max(1, round(share * len(group))) for share in SNAPSHOTS})
            if gone < len(group)
        ]
        for group in ordered
    }
    growth = {name: torch.zeros(len(each), 2).double() for name, each in snapshots.items()}
    several = [*_few(batches)]
    own = distributed.shard(ordered)
    steps = [(images, group) for images in several for group in own]
    walk, expected = None, []
    with torch.inference_mode():
        for images, group in progress(steps, "measuring damage", len(steps)):
            if group is own[0]:
                walk = GraphInterpreter(dependencies.graph, state, images)
                expected = _outputs(dependencies, walk.copy())
            assert walk is not None
            readers = sorted(group.consumers, key=lambda reader: position[reader.node])
            walk.advance(readers[0].node)
            edits = [_InputEdit(dependencies, reader, group, walk) for reader in readers]
            for snapshot, sums in zip(snapshots[group.name], growth[group.name], strict=True):
                instead = {edit.node: edit.reconstructed_inputs(snapshot) for edit in edits}
                found = _outputs(dependencies, walk.copy(), instead)
                missed = sum(edit.missed for edit in edits)
                sums += len(images) * torch.tensor([divergence(expected, found), missed])
    slopes = distributed.gather_shards([_slope(growth[group.name]) for group in own])
    return {group.name: slope for group, slope in zip(ordered, slopes, strict=True)}


def reconstruct_channels(
    group: Group, moments: Reconstruction, kept: Sequence[int]
) -> ChannelReconstruction:
    """What tells the channels of a group from the kept ones.

    The mean, where channels are looked at in several places or through several filters each.
    """
    (part, look), *more = taps_of(group).items()
    channel = torch.from_numpy(look.channel)
    if not more and torch.equal(channel.sort().values, torch.arange(len(group))):
        filters = channel.argsort()  # of each channel
        matrix, offset = moments.reconstruction(part, filters[torch.tensor(kept)].tolist())
        return ChannelReconstruction(matrix[filters][:, filters].float(), offset[filters].float())
    stays = torch.zeros(len(group))
    stays[torch.tensor(kept)] = 1
    total, count = torch.zeros(2, len(group), dtype=torch.float64)
    for name, each in taps_of(group).items():
        index = torch.from_numpy(each.channel)
        total.index_add_(0, index, moments.mean(name))
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return ChannelReconstruction(stays.diag(), (1 - stays) * (total / count).float())


class _InputEdit:
    """One reader of a group, fed with what stands in for some of its channels."""

    def __init__(
        self, dependencies: DependencyGraph, reader: Consumer, group: Group, walk: GraphInterpreter
    ) -> None:
        self.node = reader.node
        self.missed = 0.0
        """Squared error of what the reader gave last, summed over its outputs; mean over others."""
        self._dim = reader.dim
        number = np.full(
            len(dependencies.channel_of) + 1, -1, dtype=np.int64
        )  # the last stands for -1
        number[group.channels] = np.arange(len(group))
        own = number[dependencies.channel_of[reader.channels]]
        places = np.flatnonzero(own >= 0)
        # Of a channel that is read at several places, as after flattening, each is a copy.
        order = places[np.argsort(own[places], kind="stable")]
        self._channels, copies = np.unique(own[places], return_counts=True)
        self._table = torch.from_numpy(order)
        self._copies = int(copies[0]) if (copies == copies[0]).all() else 0
        self._counts = torch.from_numpy(copies)
        self._number = torch.arange(len(copies)).repeat_interleave(self._counts)

    def reconstructed_inputs(self, snapshot: ChannelReconstruction) -> Compute:
        """The reader's operation on stand-ins."""

        def compute(lookup: Callable[[Node], Any]) -> Any:
            expected = apply(self.node, lookup, {})
            source = self.node.args[0]

            def replaced(node: Node) -> Any:
                value = lookup(node)
                return self._replaced(value, snapshot) if node is source else value

            found = apply(self.node, replaced, {})
            error = (found - expected).square()
            self.missed = float(error.mean()) * error.shape[1 if error.dim() > 2 else -1]
            return found

        return compute

    def _replaced(self, value: Tensor, snapshot: ChannelReconstruction) -> Tensor:
        """The value with what stands in for channels that go.

        Channels of the group that this reader does not read tell it nothing.
        """
        channels = torch.from_numpy(self._channels)
        matrix = snapshot.matrix[channels][:, channels].to(value)
        offset, table = snapshot.offset[channels].to(value), self._table.to(value.device)
        result = value.movedim(self._dim, -1).clone()
        taken = result[..., table]
        if self._copies:
            apart = taken.unflatten(-1, (len(channels), self._copies))
            stood_in = torch.einsum("...nc,mn->...mc", apart, matrix) + offset[:, None]
            result[..., table] = stood_in.flatten(-2)
        else:  # of some channels there are more copies than of others
            number, counts = self._number.to(value.device), self._counts.to(value)
            means = taken.new_zeros(*taken.shape[:-1], len(channels))
            means = means.index_add(-1, number, taken) / counts
            told = (means @ matrix.mT + offset)[..., number]
            stays = matrix.diagonal()[number] == 1
            result[..., table] = torch.where(stays, taken, told)
        return result.movedim(-1, self._dim)


def divergence(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How far outputs are from the expected ones, a mean over images; see the module's head."""
    total = 0.0
    for wanted, given in zip(expected, found, strict=True):
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            total += float(divergence_by_image([wanted], [given], TEMPERATURE).mean())
        else:
            error = (given - wanted).double().square().mean()
            total += float(error / wanted.double().var().clamp_min(1e-30))
    return total


def _outputs(
    dependencies: DependencyGraph,
    walk: GraphInterpreter,
    instead: Mapping[Node, Compute] | None = None,
) -> list[Tensor]:
    walk.advance(overrides=instead)
    return [walk.value(node) for node in dependencies.graph.outputs]


def _slope(growth: Float[Tensor, "snapshot 2"]) -> float:
    """Output error over readers' error; `growth` has their sums."""
    ratios = [
        output / missed
        for output, missed in growth.tolist()
        if output > SMALLEST_GROWTH and missed > 0
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0


def _few(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The first images, as many as `PIXELS` says, so many at a time as fit."""
    left = -1
    for batch in batches:
        height, width = batch.images.shape[2:]
        if left < 0:
            left = min(MOST_IMAGES, max(FEWEST_IMAGES, PIXELS // (height * width)))
        images = batch.images[:left]
        left -= len(images)
        yield from images.split(images_at_a_time(height, width))
        if not left:
            return
