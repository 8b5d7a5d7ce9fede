"""Birds: the annotated parts and bounding boxes of CUB-200-2011; `data.cub` reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.data.annotated import AnnotatedFiles, Annotation
from secateur.data.concept_masks import UNLABELLED, Concept
from secateur.data.cub import Birds, image_files, read_birds

RADIUS_FRACTION = 0.1
"""Radius of a part's disc, as a fraction of the longer side of the bird's box: the distance within
which a predicted part counts as correct (PCK at 0.1; Yang & Ramanan, IEEE TPAMI 2013)."""


def read_parts(directory: Path) -> AnnotatedFiles:
    """Return the training images, with a disc around every visible part; see `RADIUS_FRACTION`."""
    birds = read_birds(directory)

    def parts(bird: int) -> Annotation:
        radius = max(1.0, RADIUS_FRACTION * float(birds.boxes[bird, 2:].max()))
        return BirdParts(birds.points[bird], birds.is_visible[bird], radius)

    return _training_images(
        directory, birds, tuple(Concept(name, "part") for name in birds.parts), parts
    )


def read_boxes(directory: Path) -> AnnotatedFiles:
    """Return the training images, with the bird's box as the region of the one concept `bird`.

    The species are not concepts here: the labels already name them.
    """
    birds = read_birds(directory)
    return _training_images(
        directory, birds, (Concept("bird", "object"),), lambda bird: BirdBox(birds.boxes[bird])
    )


@dataclass(frozen=True, eq=False)
class BirdParts:
    """The parts of one bird."""

    points: Float[Tensor, "part 2"]
    is_visible: Bool[Tensor, "part"]
    radius: float

    def planes(self, height: int, width: int) -> Tensor:
        """Return each pixel's concept index: one plane for each visible part."""
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        layers = [torch.full((height, width), UNLABELLED)]
        for part in self.is_visible.nonzero()[:, 0].tolist():
            column, row = self.points[part].tolist()
            inside = (rows - row) ** 2 + (columns - column) ** 2 <= self.radius**2
            layers.append(torch.where(inside, part, UNLABELLED))
        return torch.stack(layers)


@dataclass(frozen=True, eq=False)
class BirdBox:
    """The box of one bird."""

    box: Float[Tensor, "4"]

    def planes(self, height: int, width: int) -> Tensor:
        """Return each pixel's concept index; see `Annotation.planes`."""
        left, top, across, down = self.box.tolist()
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        inside = (rows >= top) & (rows < top + down)
        inside = inside & (columns >= left) & (columns < left + across)
        return torch.where(inside, 0, UNLABELLED)[None]


def _training_images(
    directory: Path,
    birds: Birds,
    concepts: tuple[Concept, ...],
    annotate: Callable[[int], Annotation],
) -> AnnotatedFiles:
    """Return the annotated training images; the test images are for final scores only."""
    chosen = birds.is_training.nonzero()[:, 0]
    paths = image_files(directory, birds, chosen, "training")
    return AnnotatedFiles(
        paths, birds.labels[chosen], concepts, tuple(map(annotate, chosen.tolist()))
    )
