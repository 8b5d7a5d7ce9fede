"""How much the network's output changes when channels of a group are removed: a curve per group.

Two factors make up the sensitivity of a group:

- The *error curve*: the squared error in what the group's consumers compute when the worst 1, 2, …
  channels are removed and reconstructed from the others. It follows from the second moments of the
  scoring pass (`Reconstruction.errors`).
- The *error gain*: how much such an error matters at the network's output. It is measured on some
  calibration images. Channels are reconstructed from the others in the inputs of one group's
  consumers at a time; the gain is the error of the output over the error of the consumers. The
  images share the fractions of channels that are removed among them, and the network runs again
  from the consumers on.

The second moments are those of one place where the channels are read. Where consumers read them at
several, such as a stem and behind a depthwise convolution, the error of the consumers says little
of that: the gain is then the error of the output over what the curve says.

The sensitivity is their product. So the curves of all groups have one unit, and they are smooth,
unlike direct measurements on few images.

No label is used. The output's error is the divergence of its softened softmax from the original's
(see `output_error` for networks that return no logits).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.input_edit import InputEdit
from secateur.graph.interpreter import GraphInterpreter, PartialPass, partial_pass
from secateur.graph.network_graph import NetworkGraph, Tensors
from secateur.models.divergence import error_ratio, output_error
from secateur.models.task import Task
from secateur.pruning.outcome import Sensitivity
from secateur.pruning.ranking import Ranking
from secateur.runtime import distributed
from secateur.runtime.device import full_float32
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import first_images, images_at_a_time
from secateur.scoring.criteria.reconstruction import (
    Reconstruction,
    group_error_curve,
    reconstruct_channels,
)

SNAPSHOTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Fractions of a group that are removed to measure its gain; an image takes one of them."""
MOST_IMAGES = 256
"""Images that gains are measured on, at most, if nothing else is asked for…"""
SAMPLE_PIXELS = 2**21
"""…with as many pixels all together…"""
PASS_PIXELS = 2**24
"""…of which so many go through the network, counted once for each whole pass…"""
FEWEST_IMAGES = 16
"""…but at least so many images. Where there are fewer, an image takes several snapshots."""
FEWEST_WITH_OBJECTS = 64
"""The same for detectors, where an image has few objects and the error is at these."""


@full_float32()
def measure_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    moments: Reconstruction,
    ranking: Ranking,
    batches: Iterable[Batch],
    *,
    most_images: int = MOST_IMAGES,
    task: Task | None = None,
    progress: ProgressCallback = no_progress,
) -> Sensitivity:
    """Return the sensitivity of every group.

    `moments` are those of the scoring pass. A gain is the geometric mean over the `SNAPSHOTS`, and
    0 if no removal makes a difference. All processes pass batches that begin with the same images;
    each measures its shard of the groups. For `task` see `output_error`.
    """
    groups = dependencies.groups
    curves = {
        name: group_error_curve(g, moments, ranking.order[name]) for name, g in groups.items()
    }
    position = {node: number for number, node in enumerate(dependencies.graph.nodes)}
    ordered = sorted(
        groups.values(),
        key=lambda group: min(position[consumer.node] for consumer in group.consumers),
    )
    parts = [
        partial_pass(dependencies.graph, (consumer.node for consumer in group.consumers))
        for group in ordered
    ]
    has_objects = task is not None and any(part.times is not None for part in task.parts)
    fewest = FEWEST_WITH_OBJECTS if has_objects else FEWEST_IMAGES
    passes = passes_behind(dependencies, parts)
    count = partial(image_count, passes=passes, fewest=fewest, most=most_images)
    sample = first_images(batches, count)
    measurements = [
        _GroupMeasurement(
            group, part, dependencies, moments, ranking.order[group.name], curves[group.name], task
        )
        for group, part in distributed.shard([*zip(ordered, parts, strict=True)])
    ]
    gains = error_gains(dependencies.graph, state, sample, measurements, progress)
    gain_of = {group.name: gain for group, gain in zip(ordered, gains, strict=True)}
    return {name: (gain_of[name] * curve).tolist() for name, curve in curves.items()}


class Measurement(abc.ABC):
    """Errors that an edit of the network makes, at its place and at the output."""

    part: PartialPass
    errors: Float[Tensor, "snapshot 2"]
    """Errors of the output and at the place, summed over images."""

    @abc.abstractmethod
    def add(self, plain: PlainPass) -> None:
        """Measure the errors on a batch with the snapshot that it takes."""


def error_gains(
    graph: NetworkGraph,
    state: Tensors,
    sample: Float[Tensor, "image ..."],
    measurements: Sequence[Measurement],
    progress: ProgressCallback = no_progress,
) -> list[float]:
    """Return the gains of the measurements of all processes.

    A process's measurements are its shard of them, in the order of execution.
    """
    unchanged = frozenset().union(*(measurement.part.unchanged for measurement in measurements))
    batches_by_snapshot = _by_snapshot(sample)
    steps = (
        (plain, measurement)
        for snapshot, images in batches_by_snapshot
        for plain in [PlainPass(graph, state, images, snapshot, unchanged)]
        for measurement in measurements
    )
    with torch.inference_mode():
        total = len(batches_by_snapshot) * len(measurements)
        for plain, measurement in progress(steps, "measuring sensitivity", total):
            measurement.add(plain)
    return distributed.gather_shards(
        [error_ratio(measurement.errors) for measurement in measurements]
    )


class PlainPass:
    """A batch in the network without any edit."""

    def __init__(
        self,
        graph: NetworkGraph,
        state: Tensors,
        images: Tensor,
        snapshot: int,
        unchanged: Iterable[Node],
    ) -> None:
        self.images: int = len(images)
        self.snapshot: int = snapshot
        self.interpreter: GraphInterpreter = GraphInterpreter(graph, state, images)
        """Advances from group to group."""
        self.unchanged: dict[Node, Any] = {}
        keep = {node: partial(self.unchanged.__setitem__, node) for node in unchanged}
        self.outputs: list[Tensor] = self.interpreter.copy().finish(after=keep)


class _GroupMeasurement(Measurement):
    """The errors at a group's consumers and at the output, for some numbers of removed channels."""

    def __init__(
        self,
        group: Group,
        part: PartialPass,
        dependencies: DependencyGraph,
        moments: Reconstruction,
        ranking: Sequence[int],
        curve: Float[Tensor, "count"],
        task: Task | None,
    ) -> None:
        self.part = part
        counts = sorted({max(1, round(fraction * len(group))) for fraction in SNAPSHOTS})
        counts = [removed for removed in counts if removed < len(group)]
        self.errors = torch.zeros(len(counts), 2, dtype=torch.float64)
        """`[snapshot]`: errors of the output and of the consumers, summed over images."""
        self._snapshots = [
            reconstruct_channels(group, moments, ranking[:-removed]) for removed in counts
        ]
        self._edits = [InputEdit(dependencies, consumer, group) for consumer in group.consumers]
        self._from_curve = curve[counts].tolist() if is_read_apart(group) else None
        self._task = task

    def add(self, plain: PlainPass) -> None:
        """Measure the errors on a batch with the snapshot that it takes."""
        if not self._snapshots:
            return
        number = plain.snapshot % len(self._snapshots)
        snapshot = self._snapshots[number]
        overrides = {edit.node: edit.reconstructed_inputs(snapshot) for edit in self._edits}
        plain.interpreter.advance(self.part.first)
        outputs = plain.interpreter.rerun(self.part, plain.unchanged, overrides)
        consumer_error = sum(edit.error for edit in self._edits)
        if self._from_curve is not None:
            consumer_error = self._from_curve[number]
        error = output_error(plain.outputs, outputs, self._task)
        self.errors[number] += plain.images * torch.tensor([error, consumer_error])


def passes_behind(dependencies: DependencyGraph, parts: Iterable[PartialPass]) -> float:
    """Return how many forward passes the partial passes cost all together, by their MACs."""
    whole = dependencies.count_after({})
    macs = {layer.node: layer.macs(whole) for layer in dependencies.layers}
    total = sum(macs.get(node, 0) for part in parts for node in part.nodes)
    return total / max(1, sum(macs.values()))


def image_count(shape: Sequence[int], passes: float, fewest: int, most: int = MOST_IMAGES) -> int:
    """Return how many images of a shape gains are measured on."""
    pixels = math.prod(shape[1:])
    fitting = min(SAMPLE_PIXELS, PASS_PIXELS / max(1.0, passes)) / pixels
    return int(min(most, max(fewest, fitting)))


def _by_snapshot(sample: Float[Tensor, "image ..."]) -> list[tuple[int, Tensor]]:
    """Return batches of images, each with the number of the snapshot that they take.

    Image i takes snapshot i modulo their number. Of fewer than `FEWEST_IMAGES`, it takes the next
    ones too, so that there are about as many measurements.
    """
    number, count = torch.arange(len(sample)), len(SNAPSHOTS)
    snapshots = min(count, -(-FEWEST_IMAGES // len(sample)))  # of each image
    size = images_at_a_time(*sample.shape[2:])
    return [
        (snapshot, part)
        for snapshot in range(count)
        for part in sample[(snapshot - number) % count < snapshots].split(size)
    ]


def is_read_apart(group: Group) -> bool:
    """Return whether channels of a group are read at several places, or several times each."""
    sources = {consumer.node.args[0] for consumer in group.consumers}
    copies = any(len(tap.channel) > len(np.unique(tap.channel)) for tap in group.taps)
    return len(sources) > 1 or copies
