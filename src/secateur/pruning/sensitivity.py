"""How much the network's output changes when channels of a group are removed: a curve per group.

Two factors make up the sensitivity of a group:

- The *error curve*: the squared error in what the group's consumers compute when the worst 1, 2, …
  channels are removed and reconstructed from the others. It follows from the second moments of the
  scoring pass (`Reconstruction.errors`).
- The *error gain*: how much such an error matters at the network's output. It is measured on some
  calibration images. Channels are reconstructed from the others in the inputs of one group's
  consumers at a time; the gain is the error of the output over the error of the consumers.

The sensitivity is their product. So the curves of all groups have one unit, and they are smooth,
unlike direct measurements on few images.

No label is used. If the network returns one row of logits per image, the output's error is the
divergence of its softened softmax from the original's; otherwise it is the squared difference over
the variance.
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
from secateur.graph.channel_ids import Consumer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.interpreter import GraphInterpreter, apply
from secateur.graph.network_graph import Compute, Tensors
from secateur.models.divergence import divergence_by_image
from secateur.pruning.ranking import Ranking
from secateur.runtime import distributed
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import images_at_a_time
from secateur.scoring.criteria.reconstruction import Reconstruction
from secateur.scoring.taps import taps_of

SNAPSHOTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Fractions of a group that are removed to measure its error gain."""
PIXELS = 2**21
"""Pixel budget for measuring error gains, over all images…"""
FEWEST_IMAGES, MOST_IMAGES = 32, 256
"""…within these numbers of images."""
TEMPERATURE = 4.0
"""Softens the outputs. Otherwise a few uncertain images dominate the divergence of a network that
is confident about nearly all of them."""
SMALLEST_ERROR = 1e-7
"""Smaller output errors are rounding."""

Sensitivity = Mapping[str, Sequence[float]]
"""`{group: output error when 0, 1, … up to all channels are removed}`, the last-ranked first."""


@dataclass(frozen=True, eq=False)
class ChannelReconstruction:
    """Linear estimate of a group's channels from the kept ones: `matrix x + offset`."""

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
    """Return the sensitivity of every group.

    `moments` are those of the scoring pass; `batches` begin with the same images in every process.
    """
    curves = {
        name: error_curve(group, moments, ranking.order[name])
        for name, group in dependencies.groups.items()
    }
    gains = measure_output_sensitivity(
        state, dependencies, moments, ranking, batches, progress=progress
    )
    return {name: (gains[name] * curve).tolist() for name, curve in curves.items()}


def error_curve(
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


def measure_output_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    moments: Reconstruction,
    ranking: Ranking,
    batches: Iterable[Batch],
    *,
    progress: ProgressCallback = no_progress,
) -> dict[str, float]:
    """Return each group's error gain: output error per consumer error, a geometric mean.

    The mean is over the `SNAPSHOTS`; the gain is 0 if no removal makes a difference. All processes
    pass the same batches; each measures its shard of the groups.
    """
    position = {node: number for number, node in enumerate(dependencies.graph.nodes)}
    ordered = sorted(
        dependencies.groups.values(),
        key=lambda group: min(position[consumer.node] for consumer in group.consumers),
    )
    snapshots = {
        group.name: [
            reconstruct_channels(group, moments, ranking.order[group.name][:-removed])
            for removed in sorted({max(1, round(part * len(group))) for part in SNAPSHOTS})
            if removed < len(group)
        ]
        for group in ordered
    }
    errors = {name: torch.zeros(len(shots), 2).double() for name, shots in snapshots.items()}
    shard = distributed.shard(ordered)
    steps = [(images, group) for images in [*_first_images(batches)] for group in shard]
    interpreter, expected = None, []
    with torch.inference_mode():
        for images, group in progress(steps, "measuring sensitivity", len(steps)):
            if group is shard[0]:
                interpreter = GraphInterpreter(dependencies.graph, state, images)
                expected = _outputs(dependencies, interpreter.copy())
            assert interpreter is not None
            consumers = sorted(group.consumers, key=lambda consumer: position[consumer.node])
            interpreter.advance(consumers[0].node)
            edits = [_InputEdit(dependencies, consumer, group) for consumer in consumers]
            for snapshot, sums in zip(snapshots[group.name], errors[group.name], strict=True):
                overrides = {edit.node: edit.reconstructed_inputs(snapshot) for edit in edits}
                outputs = _outputs(dependencies, interpreter.copy(), overrides)
                consumer_error = sum(edit.error for edit in edits)
                output_error = divergence(expected, outputs)
                sums += len(images) * torch.tensor([output_error, consumer_error])
    gains = distributed.gather_shards([_error_gain(errors[group.name]) for group in shard])
    return {group.name: gain for group, gain in zip(ordered, gains, strict=True)}


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
        total.index_add_(0, index, moments.mean(name))
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return ChannelReconstruction(stays.diag(), (1 - stays) * (total / count).float())


class _InputEdit:
    """Feeds one consumer of a group with reconstructed channels."""

    def __init__(self, dependencies: DependencyGraph, consumer: Consumer, group: Group) -> None:
        self.node = consumer.node
        self.error = 0.0
        """Squared error of the consumer's last output: a sum over channels, a mean over rest."""
        self._dim = consumer.dim
        table = dependencies.index_table(group.channels)
        numbers = table[dependencies.channel_of[consumer.channels]]
        places = np.flatnonzero(numbers >= 0)
        # A channel that is read at several places, as after flattening, has several copies.
        order = places[np.argsort(numbers[places], kind="stable")]
        self._channels, copies = np.unique(numbers[places], return_counts=True)
        self._table = torch.from_numpy(order)
        self._copies = int(copies[0]) if (copies == copies[0]).all() else 0
        self._counts = torch.from_numpy(copies)
        self._number = torch.arange(len(copies)).repeat_interleave(self._counts)

    def reconstructed_inputs(self, snapshot: ChannelReconstruction) -> Compute:
        """Return the consumer's operation on reconstructed inputs; it also sets `error`."""

        def compute(lookup: Callable[[Node], Any]) -> Any:
            expected = apply(self.node, lookup, {})
            source = self.node.args[0]

            def reconstructed(node: Node) -> Any:
                value = lookup(node)
                return self._reconstructed(value, snapshot) if node is source else value

            output = apply(self.node, reconstructed, {})
            error = (output - expected).square()
            self.error = float(error.mean()) * error.shape[1 if error.dim() > 2 else -1]
            return output

        return compute

    def _reconstructed(self, value: Tensor, snapshot: ChannelReconstruction) -> Tensor:
        """Return the value with reconstructions in place of the removed channels.

        Only channels that this consumer reads serve to reconstruct others.
        """
        channels = torch.from_numpy(self._channels)
        matrix = snapshot.matrix[channels][:, channels].to(value)
        offset, table = snapshot.offset[channels].to(value), self._table.to(value.device)
        result = value.movedim(self._dim, -1).clone()
        originals = result[..., table]
        if self._copies:
            by_copy = originals.unflatten(-1, (len(channels), self._copies))
            estimates = torch.einsum("...nc,mn->...mc", by_copy, matrix) + offset[:, None]
            result[..., table] = estimates.flatten(-2)
        else:  # some channels have more copies than others
            number, counts = self._number.to(value.device), self._counts.to(value)
            means = originals.new_zeros(*originals.shape[:-1], len(channels))
            means = means.index_add(-1, number, originals) / counts
            estimates = (means @ matrix.mT + offset)[..., number]
            stays = matrix.diagonal()[number] == 1
            result[..., table] = torch.where(stays, originals, estimates)
        return result.movedim(-1, self._dim)


def divergence(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Return the error of a network's outputs, a mean over images; see the top of this module."""
    total = 0.0
    for wanted, output in zip(expected, outputs, strict=True):
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            total += float(divergence_by_image([wanted], [output], TEMPERATURE).mean())
        else:
            error = (output - wanted).double().square().mean()
            total += float(error / wanted.double().var().clamp_min(1e-30))
    return total


def _outputs(
    dependencies: DependencyGraph,
    interpreter: GraphInterpreter,
    overrides: Mapping[Node, Compute] | None = None,
) -> list[Tensor]:
    interpreter.advance(overrides=overrides)
    return [interpreter.value(node) for node in dependencies.graph.outputs]


def _error_gain(errors: Float[Tensor, "snapshot 2"]) -> float:
    """Return output error over consumer error; `errors` holds the sums of both."""
    ratios = [
        output / consumer
        for output, consumer in errors.tolist()
        if output > SMALLEST_ERROR and consumer > 0
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0


def _first_images(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield the first images, as many as `PIXELS` allows, in batches that fit into memory."""
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
