"""Data sets of the Hugging Face hub, or of a folder that the library `datasets` can read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from secateur.data.images import Indices, LabelledImages, to_size
from secateur.data.preprocessing import Preprocessing
from secateur.data.splits import Splits, check_labelling
from secateur.data.unreadable import decode_all
from secateur.runtime.errors import DataError, UsageError

TEST = ("test", "validation", "valid", "val")
"""Splits that can be the test split; the first that exists and has labels is taken."""
WITHHELD = -1
"""Label of the images of a split whose labels are not published; null labels are read as this."""


@dataclass(frozen=True, eq=False)
class HuggingFaceImages(LabelledImages):
    """Images stored as files in the rows of a table, decoded when they are read."""

    name: str
    """Name of the data set and the split, for errors."""
    rows: Any
    """A `datasets.Dataset` that doesn't decode its images itself."""
    column: str
    row_indices: Int[Tensor, "image"]
    """Row of each image."""
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        return torch.stack(self._decode(indices, lambda pixels: to_size(pixels, preprocessing)))

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return self._decode(indices, lambda pixels: pixels)

    def _decode(self, indices: Indices, prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        row_indices = self.row_indices[indices].tolist()
        stored = dict(zip(indices.tolist(), self.rows[row_indices][self.column], strict=True))

        def find(index: int) -> tuple[str, Path | io.BytesIO]:
            name = f"{self.name}[{int(self.row_indices[index])}]"
            file = stored[index] or {}
            if file.get("bytes") is not None:
                return name, io.BytesIO(file["bytes"])
            return name, Path(file.get("path") or "")

        return decode_all(indices, find, prepare)

    def take(self, indices: Indices) -> HuggingFaceImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return HuggingFaceImages(
            self.name, self.rows, self.column, self.row_indices[indices], self.labels[indices]
        )


def read_hugging_face(name: str) -> Splits:
    """Return the data set with this name on the hub, or in this folder; needs the extra `hf`.

    The one column of type `Image` has the images, the one of type `ClassLabel` their classes.
    `train` is the training split; the test split is the first of `TEST` with published labels. A
    folder may be one that `DatasetDict.save_to_disk` wrote. Raises `UsageError` or `DataError`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("hf: data sets need the extra: pip install 'secateur[hf]'") from error
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name)
    except Exception as error:  # what the library raises depends on the hub, the files and parsers
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"hf:{name} can't be loaded: {type(error).__name__}: {reason}") from error
    if "train" not in splits:
        raise DataError(f"hf:{name} has no split train, only {', '.join(splits)}")
    train, classes = _read_split(name, splits, "train")
    for split in TEST:
        if split in splits and _columns(splits[split].features, datasets.ClassLabel):
            test, names = _read_split(name, splits, split)
            if names != classes:
                raise DataError(f"hf:{name}: train and {split} have different classes")
            if not (test.labels == WITHHELD).all():
                break
    else:
        raise DataError(
            f"hf:{name} has no labelled split {', '.join(TEST[:-1])} or {TEST[-1]}, only "
            f"{', '.join(splits)}"
        )
    for images in (train, test):
        check_labelling(images.labels, len(images.row_indices), len(classes), images.name)
    return Splits(classes, train, test)


def _read_split(name: str, splits: Any, split: str) -> tuple[HuggingFaceImages, tuple[str, ...]]:
    """Return a split and its class names."""
    import datasets

    rows, title = splits[split], f"hf:{name}, {split}"
    image = _column(title, rows.features, datasets.Image)
    label = _column(title, rows.features, datasets.ClassLabel)
    labels = torch.tensor(
        [WITHHELD if value is None else value for value in rows[label]], dtype=torch.int64
    )
    undecoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    images = HuggingFaceImages(title, undecoded, image, torch.arange(len(labels)), labels)
    return images, tuple(rows.features[label].names)


def _column(title: str, features: dict[str, Any], kind: type) -> str:
    """Return the name of the one column of this type; raises `DataError`."""
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
