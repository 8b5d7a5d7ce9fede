"""Images in memory as a data set: with their labels, or with what a network predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.config import TaskKind
from secateur.config.in_memory import SOURCE
from secateur.data import DataSet, LabelKind, NormalisedImages
from secateur.data.in_memory import Parts
from secateur.data.tensor_list import TensorList
from secateur.models.examine import FIRST_IMAGES, Outputs, examine_outputs
from secateur.models.labels import read_all_labels

FEW_CLASSES = 0.5
"""A note says so if the images show less than this fraction of the network's classes."""


def label_images(
    parts: Parts,
    original: nn.Module,
    kind: TaskKind | Literal["auto"],
    class_names: Sequence[str],
    classes: int | None = None,
) -> DataSet:
    """Return the parts as a data set; without labels all are 0 and count for nothing.

    Labels are among as many `classes` as the network has outputs, if no number is given.
    """
    images = (parts.score, parts.validation, parts.test)
    notes: tuple[str, ...] = ()
    kind_of_labels: LabelKind
    if parts.has_labels:
        first_outputs = examine_outputs(original, parts.score.pixels[:FIRST_IMAGES])
        if classes is not None:
            first_outputs = replace(first_outputs, columns=classes)
        raw_labels = [part.labels for part in images if part.labels is not None]
        labels, notes = read_all_labels(raw_labels, first_outputs, kind)
        kind_of_labels = _kind_of_labels(labels[0], first_outputs)
        if kind_of_labels == "classes" and labels[0].ndim == 1 and parts.score.is_from_front:
            notes += _few_classes(labels[0], first_outputs.columns)
    else:
        labels = tuple(torch.zeros(len(part.pixels), dtype=torch.int64) for part in images)
        kind_of_labels = "none"
    train, validation, test = (
        _images_with(part.pixels, numbers, kind_of_labels)
        for part, numbers in zip(images, labels, strict=True)
    )
    return DataSet(
        name=SOURCE,
        class_names=tuple(class_names),
        train=train,
        validation=validation,
        test=test,
        kind=kind_of_labels,
        has_labels=parts.has_labels,
        notes=notes,
    )


def _few_classes(labels: Tensor, classes: int) -> tuple[str, ...]:
    """Return a note if images show few of the network's classes."""
    shown = len(labels.unique())
    if shown >= FEW_CLASSES * classes:
        return ()
    return (
        f"The {len(labels)} images show {shown} of the network's {classes} classes, and filters "
        "that only the others need look useless. If the images come sorted by class, shuffle them, "
        "or pass the Dataset itself, of which a random sample is read.",
    )


def _kind_of_labels(labels: Tensor, outputs: Outputs) -> LabelKind:
    if labels.is_floating_point():
        return "values"
    return "masks" if outputs.form == "maps" else "classes"


def _images_with(pixels: TensorList, labels: Tensor, kind: LabelKind) -> NormalisedImages:
    """Return images with class numbers as labels, or with masks or numbers beside them."""
    if kind in ("classes", "none"):
        return NormalisedImages(pixels, labels)
    return NormalisedImages(pixels, torch.zeros(len(pixels), dtype=torch.int64), labels)
