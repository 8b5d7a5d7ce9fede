"""What a network is for, and how good it is at that, as the configuration and the data say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.data.batch_reader import BatchReader
from secateur.models.examine import find_task
from secateur.models.output_values import OutputPart
from secateur.models.task import Task

EXAMPLE_IMAGES = 8
"""Images that a network is tried on."""


def task_of(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    reader: BatchReader,
    example: Tensor,
    parts: Sequence[OutputPart] = (),
) -> Task:
    """Return what the network's outputs for a few images and the labels mean.

    Raises `UsageError`, `DataError` or `NotFiniteError` where they don't go together.
    """
    kind = config.model.task
    if kind == "auto" and dataset.kind == "objects":
        kind = "detection"
    labels: tuple[Tensor, ...] = dataset.all_labels
    if dataset.kind in ("masks", "values"):
        labels = (_first_labels(dataset, reader),)
    return find_task(
        model,
        example,
        labels,
        kind,
        parts=parts,
        has_labels=dataset.has_labels,
    )


def _first_labels(dataset: DataSet, reader: BatchReader) -> Tensor:
    """Return the labels of a few test images, as they are read for this network."""
    few = dataset.test.take(torch.arange(min(EXAMPLE_IMAGES, len(dataset.test.labels))))
    return next(iter(reader.read(few))).labels
