"""How much the network's output changes when channels of a group are removed: a curve per group.

Two factors make up the sensitivity of a group:

- The *error curve*: the squared error in what the group's consumers compute when the worst 1, 2, …
  channels are removed and reconstructed from the others. It follows from the second moments of the
  scoring pass (`Reconstruction.errors`).
- The *error gain*: how much such an error matters at the network's output. It is measured on some
  calibration images. Channels are reconstructed from the others in the inputs of one group's
  consumers at a time; the gain is the error of the output over the error of the consumers.

The second moments are those of one place where the channels are read. Where consumers read them at
several, such as a stem and behind a depthwise convolution, the error of the consumers says little
of that: the gain is then the error of the output over what the curve says.

The sensitivity is their product. So the curves of all groups have one unit, and they are smooth,
unlike direct measurements on few images.

No label is used. The output's error is the divergence of its softened softmax from the original's
(see `output_error` for networks that return no logits).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.input_edit import InputEdit
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.network_graph import Tensors
from secateur.models.divergence import error_ratio, output_error
from secateur.models.task import Task
from secateur.pruning.ranking import Ranking
from secateur.runtime import distributed
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import first_images
from secateur.scoring.criteria.reconstruction import (
    Reconstruction,
    group_error_curve,
    reconstruct_channels,
)

SNAPSHOTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Fractions of a group that are removed to measure its gain."""

Sensitivity = Mapping[str, Sequence[float]]
"""`{group: output error when 0, 1, … up to all channels are removed}`, the last-ranked first."""


def measure_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    moments: Reconstruction,
    ranking: Ranking,
    batches: Iterable[Batch],
    *,
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
    counts = {
        group.name: [
            removed
            for removed in sorted({max(1, round(part * len(group))) for part in SNAPSHOTS})
            if removed < len(group)
        ]
        for group in ordered
    }
    snapshots = {
        group.name: [
            reconstruct_channels(group, moments, ranking.order[group.name][:-removed])
            for removed in counts[group.name]
        ]
        for group in ordered
    }
    errors = {name: torch.zeros(len(shots), 2).double() for name, shots in snapshots.items()}
    sample = [*first_images(batches)]
    shard = distributed.shard(ordered)
    steps = [(images, group) for images in sample for group in shard]
    interpreter, expected = None, []
    with torch.inference_mode():
        for images, group in progress(steps, "measuring sensitivity", len(steps)):
            if group is shard[0]:
                interpreter = GraphInterpreter(dependencies.graph, state, images)
                expected = interpreter.copy().finish()
            assert interpreter is not None
            consumers = sorted(group.consumers, key=lambda consumer: position[consumer.node])
            interpreter.advance(consumers[0].node)
            edits = [InputEdit(dependencies, consumer, group) for consumer in consumers]
            for number, snapshot in enumerate(snapshots[group.name]):
                overrides = {edit.node: edit.reconstructed_inputs(snapshot) for edit in edits}
                outputs = interpreter.copy().finish(overrides=overrides)
                consumer_error = sum(edit.error for edit in edits)
                if is_read_apart(group):
                    consumer_error = float(curves[group.name][counts[group.name][number]])
                errors[group.name][number] += len(images) * torch.tensor(
                    [output_error(expected, outputs, task), consumer_error]
                )
    gains = distributed.gather_shards([error_ratio(errors[group.name]) for group in shard])
    gain_of = {group.name: gain for group, gain in zip(ordered, gains, strict=True)}
    return {name: (gain_of[name] * curve).tolist() for name, curve in curves.items()}


def is_read_apart(group: Group) -> bool:
    """Return whether channels of a group are read at several places, or several times each."""
    sources = {consumer.node.args[0] for consumer in group.consumers}
    copies = any(len(tap.channel) > len(np.unique(tap.channel)) for tap in group.taps)
    return len(sources) > 1 or copies
