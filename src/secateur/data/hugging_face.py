"""Data sets of the Hugging Face hub, or of a folder that the library `datasets` can read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from secateur.data.images import Images, Indices, LabelledImages, to_size
from secateur.data.masks import MASKS_LOOKED_AT, MaskedImages, count_values, legend_of_values
from secateur.data.preprocessing import Preprocessing
from secateur.data.splits import Splits, check_labelling, hold_out_fifth
from secateur.data.unreadable import decode_all, height_and_width, index_pixels, rgb_pixels
from secateur.runtime.errors import DataError, UsageError

T = TypeVar("T")

TEST = ("test", "validation", "valid", "val")
"""Splits that can be the test split; the first that exists and has labels is taken."""
MASKS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "seg"),
    *("segmentation_mask", "semantic_segmentation", "label_mask", "target", "gt"),
)
"""What the column of masks is called."""
WITHHELD = -1
"""Label of the images of a split whose labels are not published; null labels are read as this."""


@dataclass(frozen=True, eq=False)
class HuggingFaceImages(LabelledImages):
    """Images stored as files in the rows of a table, decoded when they are read."""

    title: str
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
        pixels = self.decode(indices, lambda image: to_size(rgb_pixels(image), preprocessing))
        return torch.stack(pixels)

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return self.decode(indices, rgb_pixels)

    def sizes(self, indices: Indices) -> list[tuple[int, int]]:
        """Return the heights and widths of the images at `indices`; see `StoredImages.sizes`."""
        return self.decode(indices, height_and_width)

    def decode(self, indices: Indices, decode: Callable[[Image.Image], T]) -> list[T]:
        """Return what `decode` makes of the files at `indices`; see `decode_all`."""
        row_indices = self.row_indices[indices].tolist()
        stored = dict(zip(indices.tolist(), self.rows[row_indices][self.column], strict=True))

        def find(index: int) -> tuple[str, Path | io.BytesIO]:
            name = self.name(index)
            file = stored[index] or {}
            if file.get("bytes") is not None:
                return name, io.BytesIO(file["bytes"])
            return name, Path(file.get("path") or "")

        return decode_all(indices, find, decode)

    def name(self, index: int) -> str:
        """Return the name and the row of an image, for errors."""
        return f"{self.title}[{int(self.row_indices[index])}]"

    def take(self, indices: Indices) -> HuggingFaceImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return HuggingFaceImages(
            self.title, self.rows, self.column, self.row_indices[indices], self.labels[indices]
        )


@dataclass(frozen=True, eq=False)
class HuggingFaceMasks:
    """Masks stored as files in the rows of a table."""

    rows: HuggingFaceImages

    def values(self, indices: Indices) -> list[Int[Tensor, "_ _"]]:
        """Return the values of the masks at `indices`; see `Masks.values`."""
        return self.rows.decode(indices, index_pixels)

    def name(self, index: int) -> str:
        """Return the name and the row of a mask."""
        return self.rows.name(index)

    def take(self, indices: Indices) -> HuggingFaceMasks:
        """Return a list of the masks at `indices`."""
        return HuggingFaceMasks(self.rows.take(indices))


def read_hugging_face(name: str, ignored: int | None = None) -> Splits:
    """Return the data set with this name on the hub, or in this folder; needs the extra `hf`.

    The one column of type `Image` has the images, the one of type `ClassLabel` their classes; of
    two of type `Image` the one with a name in `MASKS` has masks. `train` is the training split; the
    test split is the first of `TEST` with published labels. A folder may be one that
    `DatasetDict.save_to_disk` wrote. `ignored` is as in `read_segmentation`. Raises `UsageError` or
    `DataError`.
    """
    if name.startswith("//"):
        raise UsageError(f"data set 'hf:{name}': write hf:{name.strip('/')}")
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
    if _mask_columns(splits["train"].features) is not None:
        return _read_masked(name, splits, ignored)
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
        check_labelling(images.labels, len(images.row_indices), len(classes), images.title)
    return Splits(classes, train, test)


def _read_masked(name: str, splits: Any, ignored: int | None) -> Splits:
    """Return a data set whose images have masks, with classes by the values of the masks."""
    tested = next((split for split in TEST if split in splits), None)
    parts = {}
    for split in filter(None, ("train", tested)):
        rows, title = splits[split], f"hf:{name}, {split}"
        columns = _mask_columns(rows.features)
        if columns is None:
            raise DataError(f"{title} has no column of masks, and train has one")
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        parts[split] = tuple(
            HuggingFaceImages(
                title, _undecoded(rows, column), column, torch.arange(len(rows)), zeros
            )
            for column in columns
        )
    masks = HuggingFaceMasks(parts["train"][1])
    count = len(masks.rows.labels)
    looked_at = torch.linspace(0, count - 1, min(count, MASKS_LOOKED_AT)).long()
    legend = legend_of_values(count_values(masks, looked_at), ignored, f"hf:{name}")
    train, *others = (
        MaskedImages(images, HuggingFaceMasks(rows), legend.class_of_value)
        for images, rows in parts.values()
    )
    origin, test = "", others[0] if others else None
    held_out: tuple[Images, Images] = (train, test) if test else hold_out_fifth(train)
    if test is None:
        origin = f"hf:{name} has no test part: a fifth of the images is held out for it"
    return Splits(legend.class_names, *held_out, origin=origin, kind="masks")


def _mask_columns(features: dict[str, Any]) -> tuple[str, str] | None:
    """Return the columns of the images and of their masks, or None if there is no such pair."""
    import datasets

    columns = _columns(features, datasets.Image)
    masks = [column for column in columns if column.lower() in MASKS]
    if len(columns) != 2 or len(masks) != 1:
        return None
    [image] = set(columns) - set(masks)
    return image, masks[0]


def _read_split(name: str, splits: Any, split: str) -> tuple[HuggingFaceImages, tuple[str, ...]]:
    """Return a split and its class names."""
    import datasets

    rows, title = splits[split], f"hf:{name}, {split}"
    image = _column(title, rows.features, datasets.Image)
    label = _column(title, rows.features, datasets.ClassLabel)
    labels = torch.tensor(
        [WITHHELD if value is None else value for value in rows[label]], dtype=torch.int64
    )
    undecoded = _undecoded(rows, image)
    images = HuggingFaceImages(title, undecoded, image, torch.arange(len(labels)), labels)
    return images, tuple(rows.features[label].names)


def _undecoded(rows: Any, column: str) -> Any:
    """Return a table with the files of a column of images alone."""
    import datasets

    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))


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
