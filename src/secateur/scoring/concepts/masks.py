"""Pixel masks beside the images: one index image for each, one value for each concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.data.annotated import NO_CLASS, AnnotatedFiles, look_up, read_index_image
from secateur.data.concept_masks import UNLABELLED, Concept
from secateur.data.image_files import list_images
from secateur.data.mask_layout import read_mask_layout
from secateur.data.masks import NOT_A_CLASS, UNKNOWN, VOID
from secateur.data.segmentation import names_of_values
from secateur.data.value_names import find_names
from secateur.runtime.errors import DataError


def read_masks(directory: Path) -> AnnotatedFiles:
    """Return the images of a folder and their masks.

    `DIR/images/` with `DIR/masks/`; parts `DIR/train/` with `DIR/train_masks/`, all of them; one
    such part as DIR; or any layout of `data.mask_layout`, all parts. Masks are PNGs with the names
    of their images. What the values mean is in
    `classes.json` or `labels.json` (a list, or an object with the list as `classes` or `labels`)
    or `.txt` (one name on each line), in DIR or above a part; the first name is that of value 0.
    Without such a file 0 is the background and the concepts are the values that the masks hold;
    all masks are read for that. Raises `DataError`.
    """
    pairs, names = _pairs_and_names(directory.resolve())
    if names is None:
        values = {int(value) for _, mask in pairs for value in np.unique(_values(mask))} | {0}
        is_named = values - {0, VOID}
        names = [
            f"value {value}" if value in is_named else "void" for value in range(max(values) + 1)
        ]
    concepts = [
        value
        for value, name in enumerate(names)
        if name.lower() not in NOT_A_CLASS | {"background"}
    ]
    if not concepts:
        raise DataError(f"the masks in {directory} show nothing but background")
    table = np.full(max(len(names), VOID + 1), UNKNOWN, dtype=np.int64)
    table[[*range(len(names)), VOID]] = UNLABELLED
    table[concepts] = np.arange(len(concepts))
    return AnnotatedFiles(
        tuple(image for image, _ in pairs),
        torch.full((len(pairs),), NO_CLASS),
        tuple(Concept(names[value], "mask") for value in concepts),
        tuple(MaskFile(mask, table) for _, mask in pairs),
    )


@dataclass(frozen=True, eq=False)
class MaskFile:
    """One index image."""

    path: Path
    table: np.ndarray
    """Index of the concept by value; see `look_up`."""

    def planes(self, height: int, width: int) -> Tensor:
        """Return each pixel's concept index; see `Annotation.planes`."""
        values = _values(self.path)
        if values.shape != (height, width):
            size = f"{values.shape[1]}×{values.shape[0]}"
            raise DataError(f"the mask {self.path} is {size}, its image {width}×{height}")
        return look_up(values, self.table, self.path)[None]


def _values(path: Path) -> np.ndarray:
    values = read_index_image(path)
    if values.min() < 0:
        raise DataError(f"the mask {path} holds the value {int(values.min())}: expected 0 or more")
    return values


def _pairs_and_names(directory: Path) -> tuple[list[tuple[Path, Path]], Sequence[str] | None]:
    """Return each image with its mask, and the names of the masks' values if they have any."""
    parts = _parts(directory)
    if parts:
        pairs = [pair for part in parts for pair in _pairs(*part)]
        return pairs, find_names([directory, parts[0][1].parent])
    layout = read_mask_layout(directory)
    splits = layout.parts.values()
    pairs = [pair for part in splits for pair in zip(part.images, part.masks, strict=True)]
    return pairs, names_of_values(layout)


def _parts(directory: Path) -> list[tuple[Path, Path]]:
    """Return the folders of images, each with its folder of masks; none in other layouts."""
    if (directory / "images").is_dir() and (directory / "masks").is_dir():
        return [(directory / "images", directory / "masks")]
    beside = directory.with_name(f"{directory.name}_masks")
    if beside.is_dir():
        return [(directory, beside)]
    mask_folders = sorted(folder for folder in directory.glob("*_masks") if folder.is_dir())
    parts = [
        (folder.with_name(folder.name.removesuffix("_masks")), folder) for folder in mask_folders
    ]
    for images, masks in parts:
        if not images.is_dir():
            raise DataError(f"{masks} has no folder {images.name} of images beside it")
    return parts


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    files = list_images(images).images
    pairs = [(file, (masks / file.relative_to(images)).with_suffix(".png")) for file in files]
    for file, mask in pairs:
        if not mask.is_file():
            raise DataError(f"the image {file} has no mask {mask}")
    return pairs
