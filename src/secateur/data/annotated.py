"""Images with annotated regions.

Regions go through the same geometry as their images: annotations are drawn at the size of the image
file, then resized by nearest neighbour (by pixel centres) and cropped or padded like the image.
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

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, join_masks
from secateur.data.images import FileImages, Images, Indices, LabelledImages, masks_to_size
from secateur.data.masks import UNKNOWN
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import DECODING_ERRORS, opened_image
from secateur.runtime.errors import DataError, UsageError

NO_CLASS = -1
"""Label of the images of a list without classes."""


@runtime_checkable
class AnnotatedImages(Images, Protocol):
    """A fixed list of images with regions; `labels` are `NO_CLASS` if there are no classes."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every concept that the regions can show, by its index."""

    def regions(self, indices: Indices, preprocessing: Preprocessing) -> ConceptMasks:
        """Return the regions of the images at `indices`, in the geometry of what `read` returns.

        An image has regions only for the concepts that it shows, by index; `UNLABELLED` regions
        fill up if one image shows fewer than another. Raises `DataError`.
        """

    def take(self, indices: Indices) -> AnnotatedImages:
        """Return a list of the images at `indices`; see `Images.take`."""


@runtime_checkable
class Annotation(Protocol):
    """The annotation of one image."""

    def planes(self, height: int, width: int) -> Int[Tensor, "plane height width"]:
        """Return each pixel's concept index, or `UNLABELLED`, at the size of the image file.

        There are several planes where concepts overlap. Raises `DataError`.
        """


@dataclass(frozen=True, eq=False)
class AnnotatedFiles(LabelledImages):
    """Image files with an annotation for each."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]
    concepts: tuple[Concept, ...]
    annotations: tuple[Annotation, ...]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        return FileImages(self.paths, self.labels).read(indices, preprocessing)

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return FileImages(self.paths, self.labels).originals(indices)

    def take(self, indices: Indices) -> AnnotatedFiles:
        """Return a list of the images at `indices`; see `Images.take`."""
        return AnnotatedFiles(
            tuple(self.paths[index] for index in indices.tolist()),
            self.labels[indices],
            self.concepts,
            tuple(self.annotations[index] for index in indices.tolist()),
        )

    def regions(self, indices: Indices, preprocessing: Preprocessing) -> ConceptMasks:
        """Return the regions of the images at `indices`; see `AnnotatedImages.regions`."""

        def draw(index: int) -> ConceptMasks:
            planes = self.annotations[index].planes(*_size_of(self.paths[index]))
            return _regions(masks_to_size(planes, preprocessing))

        with ThreadPoolExecutor() as pool:
            return join_masks(list(pool.map(draw, indices.tolist())))


def join_annotations(parts: Sequence[AnnotatedFiles]) -> AnnotatedFiles:
    """Return one list with the annotations of several, whose concepts follow one another.

    Raises `UsageError` if the lists don't have the same images.
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
            _JoinedAnnotation(tuple(zip(starts, annotations, strict=True)))
            for annotations in zip(*(part.annotations for part in parts), strict=True)
        ),
    )


def look_up(values: np.ndarray, table: np.ndarray, origin: Path) -> Int[Tensor, "..."]:
    """Return the concept index of each value, or `UNLABELLED`.

    `table` holds the concept index of the values from 0 on. Raises `DataError` for a value that is
    outside it or `UNKNOWN` there.
    """
    concepts = np.append(table, UNKNOWN)[values.clip(max=len(table))]
    unknown = values[concepts == UNKNOWN]
    if unknown.size:
        raise DataError(f"{origin} holds the value {unknown.min()}, which has no name")
    return torch.from_numpy(concepts)


def read_index_image(path: Path) -> np.ndarray:
    """Return the values of an image with one number for each pixel, `[height, width]`.

    Palette images count: their values are the palette's indices. Raises `DataError` if the file
    is missing, damaged or in colours.
    """
    pixels = read_pixels(path)
    if pixels.ndim != 2:
        raise DataError(f"the mask {path} is in colours: expected one number for each pixel")
    return pixels.astype(np.int64)


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels of an annotation as stored; raises `DataError`."""
    if not path.is_file():
        raise DataError(f"no mask {path}")
    try:
        with opened_image(path) as image:
            return np.asarray(image)
    except DECODING_ERRORS as error:
        raise DataError(f"the mask {path} can't be read: {error}") from error


@dataclass(frozen=True, eq=False)
class _JoinedAnnotation:
    """Several annotations of one image, each with the index that its concepts start at."""

    parts: tuple[tuple[int, Annotation], ...]

    def planes(self, height: int, width: int) -> Tensor:
        """Return each pixel's concept index; see `Annotation.planes`."""
        shifted = []
        for start, annotation in self.parts:
            planes = annotation.planes(height, width)
            shifted.append(torch.where(planes == UNLABELLED, UNLABELLED, planes + start))
        return torch.cat(shifted)


def _regions(planes: Tensor) -> ConceptMasks:
    """Return the regions of one image, an `UNLABELLED` one if it shows nothing."""
    # Sorting all values, as `unique` does, takes longer than decoding the image.
    concepts = (planes.flatten() - UNLABELLED).bincount()[1:].nonzero()[:, 0]
    if not len(concepts):
        empty = torch.zeros(1, 1, *planes.shape[1:], dtype=torch.bool)
        return ConceptMasks(empty, torch.tensor([[UNLABELLED]]))
    masks = (planes == concepts[:, None, None, None]).any(1)  # [region, height, width]
    return ConceptMasks(masks[None], concepts[None])


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with opened_image(path) as image:
            return image.height, image.width
    except DECODING_ERRORS as error:
        raise DataError(f"the image {path} can't be read: {error}") from error


def _brief(files: AnnotatedFiles) -> str:
    return f"{len(files.paths)} from {files.paths[0].parent}"
