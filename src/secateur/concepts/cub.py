"""Birds: the annotated parts and bounding boxes of CUB-200-2011 (Wah et al., Caltech 2011)."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.data.annotated import AnnotatedFiles, Annotation
from secateur.errors import DataError
from secateur.regions import ABSENT, Concept

RADIUS_FRACTION = 0.1
"""Radius of a part's disc, as a share of the longer side of the bird's box: the distance within
which a predicted part counts as found (PCK at 0.1; Yang & Ramanan, IEEE TPAMI 2013)."""


@dataclass(frozen=True, eq=False)
class Birds:
    """The annotations of the whole data set, in the order of its image numbers."""

    files: tuple[str, ...]
    """Paths below `images/`."""
    classes: tuple[str, ...]
    labels: Int[Tensor, "image"]
    """Class numbers from 0 on."""
    is_training: Bool[Tensor, "image"]
    boxes: Float[Tensor, "image 4"]
    """Left, top, width and height in pixels."""
    parts: tuple[str, ...]
    points: Float[Tensor, "image part 2"]
    """Column and row of the pixel."""
    is_visible: Bool[Tensor, "image part"]


def read_parts(directory: Path) -> AnnotatedFiles:
    """The training images, with a disc around every visible part; see `RADIUS_FRACTION`."""
    birds = read_birds(directory)

    def parts(bird: int) -> Annotation:
        radius = max(1.0, RADIUS_FRACTION * float(birds.boxes[bird, 2:].max()))
        return BirdParts(birds.points[bird], birds.is_visible[bird], radius)

    return _training_images(
        directory, birds, tuple(Concept(name, "part") for name in birds.parts), parts
    )


def read_boxes(directory: Path) -> AnnotatedFiles:
    """The training images, with the bird's box as the region of the one concept `bird`.

    The species are no concepts here: that they are in the picture is what the labels say.
    """
    birds = read_birds(directory)
    return _training_images(
        directory, birds, (Concept("bird", "object"),), lambda bird: BirdBox(birds.boxes[bird])
    )


def read_birds(directory: Path) -> Birds:
    """Every annotation, from the published folder or a flat one, as `.txt` or `.txt.gz`.

    No image is looked for. Raises `DataError` where a file is missing or they do not agree.
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
        raise DataError(f"{directory}: a class number lies outside 1 to {len(classes)}")
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


@dataclass(frozen=True, eq=False)
class BirdParts:
    """The parts of one bird."""

    points: Float[Tensor, "part 2"]
    is_visible: Bool[Tensor, "part"]
    radius: float

    def planes(self, height: int, width: int) -> Tensor:
        """See `Annotation.planes`: a layer for each part that is visible."""
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        layers = [torch.full((height, width), ABSENT)]
        for number in self.is_visible.nonzero()[:, 0].tolist():
            column, row = self.points[number].tolist()
            inside = (rows - row) ** 2 + (columns - column) ** 2 <= self.radius**2
            layers.append(torch.where(inside, number, ABSENT))
        return torch.stack(layers)


@dataclass(frozen=True, eq=False)
class BirdBox:
    """Where one bird is."""

    box: Float[Tensor, "4"]

    def planes(self, height: int, width: int) -> Tensor:
        """See `Annotation.planes`."""
        left, top, across, down = self.box.tolist()
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        inside = (rows >= top) & (rows < top + down)
        inside = inside & (columns >= left) & (columns < left + across)
        return torch.where(inside, 0, ABSENT)[None]


def _training_images(
    directory: Path,
    birds: Birds,
    concepts: tuple[Concept, ...],
    annotate: Callable[[int], Annotation],
) -> AnnotatedFiles:
    """The others are for final scores."""
    chosen = birds.is_training.nonzero()[:, 0]
    paths = [directory / "images" / birds.files[bird] for bird in chosen.tolist()]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} training images of CUB-200-2011 are missing, "
            f"{missing[0]} among them: the annotations come without, put its images/ there"
        )
    return AnnotatedFiles(
        tuple(paths), birds.labels[chosen], concepts, tuple(map(annotate, chosen.tolist()))
    )


def _text(directory: Path, name: str) -> str:
    for folder in (directory, directory / "parts"):
        for file in (folder / f"{name}.txt", folder / f"{name}.txt.gz"):
            if file.is_file():
                try:
                    content = file.read_bytes()
                    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
                except (OSError, EOFError, ValueError) as error:
                    raise DataError(f"{file} can't be read: {error}") from error
    raise DataError(f"no {name}.txt or {name}.txt.gz of CUB-200-2011 in {directory}")


def _names(directory: Path, name: str) -> tuple[str, ...]:
    """The names in lines `NUMBER NAME`, numbered from 1 on."""
    lines = [line.partition(" ") for line in _text(directory, name).splitlines() if line.strip()]
    if [number for number, _, _ in lines] != [str(place + 1) for place in range(len(lines))]:
        raise DataError(f"{directory}: the lines of {name} are not numbered from 1 on")
    return tuple(rest.strip() for _, _, rest in lines)


def _table(directory: Path, name: str, columns: int) -> np.ndarray:
    try:
        table = np.loadtxt(io.StringIO(_text(directory, name)), ndmin=2)
    except ValueError as error:
        raise DataError(f"{directory}: {name} is no table of numbers: {error}") from error
    if table.shape[1] != columns:
        raise DataError(f"{directory}: {name} has {table.shape[1]} columns, not {columns}")
    return table


def _check_numbers(directory: Path, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        raise DataError(
            f"{directory}: {name} has {len(found)} lines that do not go through the "
            f"{len(expected)} expected ones in order"
        )
