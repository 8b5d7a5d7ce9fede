"""Images in memory as a data set: with their labels, or with what a network predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from secateur.config import TaskKind
from secateur.config.in_memory import SOURCE
from secateur.data import DataSet, NormalisedImages
from secateur.data.in_memory import Parts
from secateur.models.evaluate import predict_classes
from secateur.models.labels import read_all_labels
from secateur.models.task import examine_outputs, find_task

FEW_CLASSES = 0.5
"""A note says so if the images show less than this fraction of the network's classes."""


def label_images(
    parts: Parts,
    original: nn.Module,
    kind: TaskKind | Literal["auto"],
    batch_size: int,
    class_names: Sequence[str],
) -> DataSet:
    """Return the parts as a data set, labelled with the original's classes if need be."""
    images = (parts.score, parts.validation, parts.test)
    notes: tuple[str, ...] = ()
    if not parts.has_labels:
        task = find_task(original, parts.score.pixels, kind=kind)
        labels = tuple(predict_classes(original, p.pixels, batch_size, task) for p in images)
    else:
        outputs = examine_outputs(original, parts.score.pixels)
        raw_labels = [part.labels for part in images if part.labels is not None]
        labels, notes = read_all_labels(raw_labels, outputs, kind)
        shown = len(labels[0].unique())
        is_single = labels[0].ndim == 1
        if is_single and parts.score.is_from_front and shown < FEW_CLASSES * outputs.columns:
            notes += (
                f"The {len(labels[0])} images show {shown} of the network's {outputs.columns} "
                "classes, and filters that only the others need look useless. If the images come "
                "sorted by class, shuffle them, or pass the Dataset itself, of which a random "
                "sample is read.",
            )
    train, validation, test = (
        NormalisedImages(part.pixels, numbers) for part, numbers in zip(images, labels, strict=True)
    )
    return DataSet(
        name=SOURCE,
        class_names=tuple(class_names),
        train=train,
        validation=validation,
        test=test,
        has_labels=parts.has_labels,
        notes=notes,
    )
