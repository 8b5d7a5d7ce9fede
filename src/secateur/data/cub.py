"""CUB-200-2011, images of birds by species with annotations (Wah et al., Caltech 2011)."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.data.images import FileImages
from secateur.data.splits import Splits
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import TEXT, inside, read_unzipped


@dataclass(frozen=True, eq=False)
class Birds:
    """The annotations of the whole data set, in its own order of the images."""

    files: tuple[str, ...]
    """Paths below `images/`."""
    classes: tuple[str, ...]
    labels: Int[Tensor, "image"]
    """Class indices."""
    is_training: Bool[Tensor, "image"]
    boxes: Float[Tensor, "image 4"]
    """Left, top, width and height in pixels."""
    parts: tuple[str, ...]
    points: Float[Tensor, "image part 2"]
    """Column and row of the pixel."""
    is_visible: Bool[Tensor, "image part"]


def read_cub(directory: Path) -> Splits:
    """Return the images of the 200 species, split as published in `train_test_split.txt`.

    `directory` is the published folder with `images.txt` and `images/`. The species of the folder
    `001.Black_footed_Albatross` is called `Black footed Albatross`. Raises `DataError`.
    """
    birds = read_birds(directory)
    names = tuple(re.sub(r"^\d+\.", "", name).replace("_", " ") for name in birds.classes)
    return Splits(
        names,
        _part(directory, birds, birds.is_training, "training"),
        _part(directory, birds, ~birds.is_training, "test"),
    )


def image_files(
    directory: Path, birds: Birds, indices: Int[Tensor, "image"], title: str
) -> tuple[Path, ...]:
    """Return the files of the images at `indices`; raises `DataError` if some are missing."""
    folder = directory / "images"
    paths = tuple(inside(folder, birds.files[index], DataError) for index in indices.tolist())
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} {title} images of CUB-200-2011 are missing, "
            f"{missing[0]} among them: put the data set's images/ beside its annotations"
        )
    return paths


def read_birds(directory: Path) -> Birds:
    """Return every annotation, from the published folder or a flat one, as `.txt` or `.txt.gz`.

    Images need not be there. Raises `DataError` if a file is missing or files disagree.
    """
    files = _names(directory, "images")
    classes, parts = _names(directory, "classes"), _names(directory, "parts")
    labels = _table(directory, "image_class_labels", 2)
    split = _table(directory, "train_test_split", 2)
    boxes = _table(directory, "bounding_boxes", 5)
    points = _table(directory, "part_locs", 5)
    for name, table in (
        ("image_class_labels", labels),
        ("train_test_split", split),
        ("bounding_boxes", boxes),
    ):
        _check_numbers(directory, name, table[:, :1], np.arange(1, len(files) + 1)[:, None])
    pairs = np.stack(np.divmod(np.arange(len(files) * len(parts)), len(parts)), axis=1) + 1
    _check_numbers(directory, "part_locs", points[:, :2], pairs)
    if not ((labels[:, 1] >= 1) & (labels[:, 1] <= len(classes))).all():
        raise DataError(f"{directory} has a class number outside 1 to {len(classes)}")
    located = torch.from_numpy(points[:, 2:].reshape(len(files), len(parts), 3))
    return Birds(
        files=files,
        classes=classes,
        labels=torch.from_numpy(labels[:, 1]).long() - 1,
        is_training=torch.from_numpy(split[:, 1]) == 1,
        boxes=torch.from_numpy(boxes[:, 1:]),
        parts=parts,
        points=located[..., :2],
        is_visible=located[..., 2] == 1,
    )


def _part(directory: Path, birds: Birds, chosen: Bool[Tensor, "image"], title: str) -> FileImages:
    indices = chosen.nonzero()[:, 0]
    if not len(indices):
        raise DataError(f"{directory}: train_test_split leaves no {title} images")
    return FileImages(image_files(directory, birds, indices, title), birds.labels[indices])


def _text(directory: Path, name: str) -> str:
    for folder in (directory, directory / "parts"):
        for file in (folder / f"{name}.txt", folder / f"{name}.txt.gz"):
            if file.is_file():
                try:
                    return read_unzipped(file, TEXT, DataError).decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{file} can't be read: {error}") from error
    raise DataError(f"no {name}.txt or {name}.txt.gz of CUB-200-2011 in {directory}")


def _names(directory: Path, name: str) -> tuple[str, ...]:
    """Return the names in lines `NUMBER NAME`, numbered from 1 on."""
    lines = [line.partition(" ") for line in _text(directory, name).splitlines() if line.strip()]
    if [number for number, _, _ in lines] != [str(place + 1) for place in range(len(lines))]:
        raise DataError(f"{directory}: the lines of {name} are not numbered from 1 on")
    return tuple(rest.strip() for _, _, rest in lines)


def _table(directory: Path, name: str, columns: int) -> np.ndarray:
    try:
        table = np.loadtxt(io.StringIO(_text(directory, name)), ndmin=2)
    except ValueError as error:
        raise DataError(f"{directory}: {name} is not a table of numbers: {error}") from error
    if table.shape[1] != columns:
        raise DataError(f"{directory}: {name} has {table.shape[1]} columns, not {columns}")
    return table


def _check_numbers(directory: Path, name: str, numbers: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(numbers, expected):
        raise DataError(
            f"{directory}: the {len(numbers)} lines of {name} are not the {len(expected)} "
            "expected, numbered in order"
        )
