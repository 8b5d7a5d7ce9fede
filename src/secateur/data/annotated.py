"""Images that come with annotated regions.

Regions go through the geometry of the images that they belong to: annotations are drawn at the
size of the image file, resized to the shorter side by nearest neighbour (by pixel centres) and
cropped like the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, join_masks
from secateur.data.images import FileImages, Images, Indices, to_size
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import DECODING_ERRORS, opened_image
from secateur.errors import DataError, UsageError

NO_CLASS = -1
"""Label of an image of a list that has no classes."""
UNKNOWN = -2
"""In place of the number of a concept where a value of a mask means nothing that is known."""


@runtime_checkable
class AnnotatedImages(Images, Protocol):
    """A fixed list of images with regions; `labels` are `NO_CLASS` where there are no classes."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every concept that the regions can show, in the order of their numbers."""

    def regions(self, indices: Indices, preprocessing: Preprocessing) -> ConceptMasks:
        """The regions of the images with these numbers, in the plane of what `read` gives.

        Only concepts that an image shows, in the order of their numbers; where one image shows
        fewer than another, absent regions fill up. Raises `DataError`.
        """

    def take(self, indices: Indices) -> AnnotatedImages:
        """See `Images.take`."""


@runtime_checkable
class Annotation(Protocol):
    """What is known of one image."""

    def planes(self, height: int, width: int) -> Int[Tensor, "layer height width"]:
        """At the size of the image file, the number of a concept at each pixel, or `ABSENT`.

        Several layers where concepts overlap. Raises `DataError`.
        """


@dataclass(frozen=True, eq=False)
class AnnotatedFiles:
    """Image files, and what is known of each."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]
    concepts: tuple[Concept, ...]
    annotations: tuple[Annotation, ...]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        return FileImages(self.paths, self.labels).read(indices, preprocessing)

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        return FileImages(self.paths, self.labels).originals(indices)

    def take(self, indices: Indices) -> AnnotatedFiles:
        """See `Images.take`."""
        numbers = indices.tolist()
        return AnnotatedFiles(
            tuple(self.paths[number] for number in numbers),
            self.labels[indices],
            self.concepts,
            tuple(self.annotations[number] for number in numbers),
        )

    def regions(self, indices: Indices, preprocessing: Preprocessing) -> ConceptMasks:
        """See `AnnotatedImages.regions`."""

        def draw(number: int) -> ConceptMasks:
            planes = self.annotations[number].planes(*_size_of(self.paths[number]))
            return _regions(_to_size(planes, preprocessing))

        with ThreadPoolExecutor() as pool:
            return join_masks(list(pool.map(draw, indices.tolist())))


def join_annotations(parts: Sequence[AnnotatedFiles]) -> AnnotatedFiles:
    """One list with the annotations of several, whose concepts follow one another.

    Raises `UsageError` where they are not lists of the same images.
    """
    first, *others = parts
    for other in others:
        if other.paths != first.paths:
            raise UsageError(
                "annotations of different images can't be used at once: one source brings "
                f"{_brief(first)}, another {_brief(other)}"
            )
    if not others:
        return first
    starts = [sum(len(part.concepts) for part in parts[:place]) for place in range(len(parts))]
    return AnnotatedFiles(
        first.paths,
        first.labels,
        tuple(concept for part in parts for concept in part.concepts),
        tuple(
            _JoinedAnnotation(tuple(zip(starts, each, strict=True)))
            for each in zip(*(part.annotations for part in parts), strict=True)
        ),
    )


def look_up(values: np.ndarray, table: np.ndarray, origin: Path) -> Int[Tensor, "..."]:
    """The number of the concept that each value stands for, or `ABSENT`.

    `table` is of values from 0 on, `UNKNOWN` where there is none of that number; then this raises
    `DataError`.
    """
    numbers = np.append(table, UNKNOWN)[values.clip(max=len(table))]
    unknown = values[numbers == UNKNOWN]
    if unknown.size:
        raise DataError(f"{origin} holds the value {unknown.min()}, which has no name")
    return torch.from_numpy(numbers)


def read_index_image(path: Path) -> np.ndarray:
    """`[height, width]` of a file with one number a pixel, a palette's included.

    Raises `DataError` where the file is missing, damaged or in colours.
    """
    pixels = read_pixels(path)
    if pixels.ndim != 2:
        raise DataError(f"the mask {path} is in colours: expected one number a pixel")
    return pixels.astype(np.int64)


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of an annotation as they are stored; raises `DataError`."""
    if not path.is_file():
        raise DataError(f"no mask {path}")
    try:
        with opened_image(path) as image:
            return np.asarray(image)
    except DECODING_ERRORS as error:
        raise DataError(f"the mask {path} can't be read: {error}") from error


@dataclass(frozen=True, eq=False)
class _JoinedAnnotation:
    """Several annotations of one image, each with the number that its concepts start at."""

    parts: tuple[tuple[int, Annotation], ...]

    def planes(self, height: int, width: int) -> Tensor:
        """See `Annotation.planes`."""
        found = []
        for start, part in self.parts:
            planes = part.planes(height, width)
            found.append(torch.where(planes == UNLABELLED, UNLABELLED, planes + start))
        return torch.cat(found)


def _to_size(planes: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What `to_size` does to the image, done to its planes; nothing is over the image's edge."""
    shifted = (planes - UNLABELLED).float()  # the crop fills up with zeros
    nearest = v2.InterpolationMode.NEAREST_EXACT
    return to_size(shifted, preprocessing, nearest).long() + UNLABELLED


def _regions(planes: Tensor) -> ConceptMasks:
    """The regions of one image; an absent one where it shows nothing."""
    # Sorting them all, as `unique` does, takes longer than decoding the image.
    numbers = (planes.flatten() - UNLABELLED).bincount()[1:].nonzero()[:, 0]
    if not len(numbers):
        empty = torch.zeros(1, 1, *planes.shape[1:], dtype=torch.bool)
        return ConceptMasks(empty, torch.tensor([[UNLABELLED]]))
    masks = (planes == numbers[:, None, None, None]).any(1)  # [region, height, width]
    return ConceptMasks(masks[None], numbers[None])


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with opened_image(path) as image:
            return image.height, image.width
    except DECODING_ERRORS as error:
        raise DataError(f"the image {path} can't be read: {error}") from error


def _brief(files: AnnotatedFiles) -> str:
    return f"{len(files.paths)} from {files.paths[0].parent}"
