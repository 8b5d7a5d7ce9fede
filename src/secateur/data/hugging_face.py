"""Data sets of the Hugging Face hub, or of a folder that its library `datasets` can read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from secateur.data.images import Indices, to_size
from secateur.data.preprocessing import Preprocessing
from secateur.data.splits import Splits, check_labelling
from secateur.data.unreadable import decode_all
from secateur.errors import DataError, UsageError

TEST = ("test", "validation", "valid", "val")
"""Splits that can be the test part, the first that is there and has labels."""
WITHHELD = -1
"""Label of every image of a split whose labels are not published; null labels are read as it."""


@dataclass(frozen=True, eq=False)
class HuggingFaceImages:
    """Images that lie as files in the rows of a table and are decoded when they are asked for."""

    name: str
    """Of the data set and the split, for errors."""
    rows: Any
    """A `datasets.Dataset` whose images are not decoded by it."""
    column: str
    numbers: Int[Tensor, "image"]
    """The row of each image."""
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        return torch.stack(self._decoded(indices, lambda one: to_size(one, preprocessing)))

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        return self._decoded(indices, lambda pixels: pixels)

    def _decoded(self, indices: Indices, prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        numbers = self.numbers[indices].tolist()
        stored = dict(zip(indices.tolist(), self.rows[numbers][self.column], strict=True))

        def find(index: int) -> tuple[str, Path | io.BytesIO]:
            name = f"{self.name}[{int(self.numbers[index])}]"
            file = stored[index] or {}
            if file.get("bytes") is not None:
                return name, io.BytesIO(file["bytes"])
            return name, Path(file.get("path") or "")

        return decode_all(indices, find, prepare)

    def take(self, indices: Indices) -> HuggingFaceImages:
        """See `Images.take`."""
        return HuggingFaceImages(
            self.name, self.rows, self.column, self.numbers[indices], self.labels[indices]
        )


def read_hugging_face(name: str) -> Splits:
    """The data set of this name on the hub, or in this folder; needs the extra `hf`.

    The one column of type `Image` has the images, the one of type `ClassLabel` their classes.
    `train` is the training part; the test part is the first of `TEST` with published labels.
    A folder may be one that `DatasetDict.save_to_disk` has left. Raises `UsageError` or
    `DataError`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("hf: data sets need the extra: pip install 'secateur[hf]'") from error
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # what the library raises depends on the hub, the files and parsers
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"hf:{name} can't be loaded: {type(error).__name__}: {reason}") from error
    if "train" not in found:
        raise DataError(f"hf:{name} has no split train, only {', '.join(found)}")
    train, classes = _part(name, found, "train")
    for split in TEST:
        if split in found and _columns(found[split].features, datasets.ClassLabel):
            test, names = _part(name, found, split)
            if names != classes:
                raise DataError(f"hf:{name}: train and {split} have different classes")
            if not (test.labels == WITHHELD).all():
                break
    else:
        raise DataError(
            f"hf:{name} has no labelled split {', '.join(TEST[:-1])} or {TEST[-1]}, only "
            f"{', '.join(found)}"
        )
    for images in (train, test):
        check_labelling(images.labels, len(images.numbers), len(classes), images.name)
    return Splits(classes, train, test)


def _part(name: str, found: Any, split: str) -> tuple[HuggingFaceImages, tuple[str, ...]]:
    """A split, and the names of its classes."""
    import datasets

    rows, title = found[split], f"hf:{name}, {split}"
    image = _column(title, rows.features, datasets.Image)
    label = _column(title, rows.features, datasets.ClassLabel)
    labels = torch.tensor(
        [WITHHELD if each is None else each for each in rows[label]], dtype=torch.int64
    )
    undecoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    images = HuggingFaceImages(title, undecoded, image, torch.arange(len(labels)), labels)
    return images, tuple(rows.features[label].names)


def _column(title: str, features: dict[str, Any], kind: type) -> str:
    """The name of the one column of this type; raises `DataError`."""
    columns = _columns(features, kind)
    if len(columns) != 1:
        several = f"several columns ({', '.join(columns)})" if columns else "no column"
        raise DataError(
            f"{title} has {several} of type {kind.__name__}, where one is expected; it has "
            f"{', '.join(features)}"
        )
    return columns[0]


def _columns(features: dict[str, Any], kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]
