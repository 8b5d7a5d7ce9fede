"""Labels in the forms that people have them in, read as class numbers, masks or values.

Class numbers may be of any type, also -1 and 1 for a single output, one-hot rows, and probabilities
of classes; rows of 0 and 1 are several labels for an image. Whole numbers for each position are
masks. Other numbers are values to regress, where the network can return them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.config import TaskKind
from secateur.data.images import IGNORED
from secateur.models.examine import Outputs
from secateur.models.task import Labels, check_labels
from secateur.runtime.errors import DataError

VOID = 255
"""What masks hold where no class is annotated."""
SUM_TOLERANCE = 1e-3
"""How far from 1 the sum of probabilities may be."""


def read_all_labels(
    parts: Sequence[Tensor], outputs: Outputs, kind: TaskKind | Literal["auto"] = "auto"
) -> tuple[tuple[Labels, ...], tuple[str, ...]]:
    """Return `read_labels` of several sets of images, which must have labels of one form."""
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(dict.fromkeys(str(list(part.shape)) for part in parts))
        raise DataError(f"labels are {shapes}: those for scoring and for the test need one form")
    labels, notes = read_labels(torch.cat(list(parts)), outputs, kind)
    return labels.split([len(part) for part in parts]), notes


def read_labels(
    labels: Tensor, outputs: Outputs, kind: TaskKind | Literal["auto"] = "auto"
) -> tuple[Labels, tuple[str, ...]]:
    """Return class numbers, 0 or 1 for each of several labels, masks or values, and notes.

    `kind` is `ModelSection.task`; the notes are for the user. Values are floats, all others whole
    numbers. Raises `DataError` if labels don't fit the outputs.
    """
    if labels.is_complex():
        raise DataError(f"labels are {list(labels.shape)} of {labels.dtype}: expected real numbers")
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        raise DataError("labels hold a number that is not finite")
    if kind in ("detection", "regression") or (kind == "auto" and _is_values(labels, outputs)):
        return labels.float(), ()
    if outputs.form == "maps" and labels.ndim > 2:
        return _masks(labels, outputs)
    if labels.ndim not in (1, 2):
        raise DataError(
            f"labels are {list(labels.shape)} of {labels.dtype}: expected a class number for each "
            "image, or [image, class]"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] != outputs.columns:
        raise DataError(
            f"labels are {list(labels.shape)}, but the network has {outputs.columns} outputs for "
            "each image: expected a class number for each image, or one column for each output"
        )
    is_several = kind == "multi-label" or (kind == "auto" and outputs.scale == "sigmoid")
    if labels.ndim == 2:
        return _rows(labels.double(), is_several=is_several)
    return _class_numbers(labels, outputs.columns)


def _is_values(labels: Tensor, outputs: Outputs) -> bool:
    """Return whether labels are values to regress: floats in the shape of what is returned."""
    if not labels.is_floating_point() or not outputs.leaves or outputs.form == "rows":
        return labels.is_floating_point() and outputs.form == "values"
    return labels[0].numel() == outputs.leaves[0][0].numel() and not _is_whole(labels)


def _is_whole(labels: Tensor) -> bool:
    return bool((labels == labels.round()).all())


def _masks(labels: Tensor, outputs: Outputs) -> tuple[Tensor, tuple[str, ...]]:
    """Read a class for each position: `[image, height, width]`, or with one channel."""
    if not _is_whole(labels.float()):
        raise DataError(
            "masks hold numbers that are no class numbers, and the network returns maps"
        )
    if labels.ndim == outputs.leaves[0].ndim and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == outputs.leaves[0].ndim and labels.shape[1] == outputs.columns > 1:
        return labels.argmax(1), ("Masks are one-hot: each position is read as its class number.",)
    masks = labels.long()
    notes: tuple[str, ...] = ()
    if int(masks.max()) == VOID and outputs.columns <= VOID:
        masks, notes = masks.masked_fill(masks == VOID, IGNORED), (f"{VOID} in masks is ignored.",)
    return masks, notes


def _class_numbers(labels: Tensor, columns: int) -> tuple[Tensor, tuple[str, ...]]:
    numbers = labels.long()
    if labels.is_floating_point() and not bool((numbers == labels).all()):
        value = float(labels[numbers != labels][0])
        raise DataError(
            f"labels hold {value:.4g}, which is not a class number (for a regression set "
            "model.task or --task to regression)"
        )
    if columns > 1:
        check_labels(numbers, columns)
        return numbers, ()
    values = set(numbers.unique().tolist())
    if values <= {-1, 1} and -1 in values:
        return (numbers + 1) // 2, ("Labels of -1 are read as class 0.",)
    if not values <= {0, 1}:
        raise DataError(
            f"labels go from {min(values)} to {max(values)}, but the network has one output, whose "
            "sign says class 0 or 1 (for a regression set model.task or --task to regression)"
        )
    return numbers, ()


def _rows(labels: Tensor, *, is_several: bool) -> tuple[Tensor, tuple[str, ...]]:
    """Read labels `[image, class]`."""
    notes: tuple[str, ...] = ()
    if bool(((labels == -1) | (labels == 1)).all()) and bool((labels == -1).any()):
        labels, notes = (labels + 1) / 2, ("Labels of -1 are read as 0.",)
    if bool(((labels == 0) | (labels == 1)).all()):
        if is_several or not bool((labels.sum(1) == 1).all()):
            return labels.long(), notes
        return labels.argmax(1), (*notes, "Labels are one-hot: each is read as its class number.")
    sums = labels.sum(1)
    if bool((labels < 0).any()) or bool(((sums - 1).abs() > SUM_TOLERANCE).any()):
        value = float(labels[(labels != 0) & (labels != 1)][0])
        raise DataError(
            f"labels [image, class] hold {value:.4g}: expected 0 or 1 for each class, or "
            "probabilities that add up to 1 (for a regression set model.task or --task to "
            "regression)"
        )
    first, second = labels.topk(2, dim=1).values.T
    if not bool((first > second).all()):
        number = int((first == second).nonzero()[0])
        raise DataError(
            f"the label of image {number} gives two classes the same probability, "
            f"{first[number]:.4g}: leave it out, or choose one"
        )
    return labels.argmax(1), ("Labels are probabilities: the most probable class is the label.",)
